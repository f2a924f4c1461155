"""Standardised uptake by body weight: the factor that takes a PET object's Bq/ml to g/ml.

After QIBA's "SUV vendor-neutral pseudo-code" (its path for BQML and GML, without what private elements may add) and
PS3.3 §C.8.9.1. A value that is missing or says something else is named, never assumed: a wrong SUV looks like one.
"""

import math
from datetime import datetime, timedelta
from typing import Any, Final

from cache.errors import UnsupportedPixels

#: Attributes of the object itself that the factor may need.
KEYWORDS: Final = (
    "Units",
    "CorrectedImage",
    "DecayCorrection",
    "PatientWeight",
    "SeriesDate",
    "SeriesTime",
    "AcquisitionDate",
    "AcquisitionTime",
    "RadiopharmaceuticalInformationSequence",
)


def suvbw_factor(dataset: Any) -> float:
    """g/ml for one unit of the rescaled value. Raises: UnsupportedPixels: it names what is missing or unfit."""
    units = _text(dataset, "Units")
    if units == "GML":
        return 1.0
    if units != "BQML":
        raise UnsupportedPixels("Units is neither BQML nor GML")
    corrected = {str(part) for part in dataset.get("CorrectedImage") or ()}
    if not {"ATTN", "DECY"} <= corrected:
        raise UnsupportedPixels("Corrected Image lacks ATTN or DECY")
    weight = _positive(dataset, "PatientWeight")
    tracers = list(dataset.get("RadiopharmaceuticalInformationSequence") or [])
    if len(tracers) != 1:
        raise UnsupportedPixels("Radiopharmaceutical Information Sequence has no item, or several")
    dose = _positive(tracers[0], "RadionuclideTotalDose")
    correction = _text(dataset, "DecayCorrection")
    if correction == "START":
        dose *= 2.0 ** (-_decayed_for(dataset, tracers[0]) / _positive(tracers[0], "RadionuclideHalfLife"))
    elif correction != "ADMIN":
        raise UnsupportedPixels("Decay Correction is neither START nor ADMIN")
    factor = weight * 1000.0 / dose if dose else math.inf
    if not math.isfinite(factor):
        raise UnsupportedPixels("the decayed dose is nothing")
    return factor


def _decayed_for(dataset: Any, tracer: Any) -> float:
    """Seconds from the administration to the start of the scan, to which the values are corrected."""
    scan = _moment(_text(dataset, "SeriesDate"), _text(dataset, "SeriesTime"), "Series Date or Time")
    acquired = _moment(_text(dataset, "AcquisitionDate"), _text(dataset, "AcquisitionTime"), "Acquisition Date or Time")
    if scan > acquired:
        raise UnsupportedPixels("Series Time is after Acquisition Time: the start of the scan is not known")
    if started := _text(tracer, "RadiopharmaceuticalStartDateTime"):
        given = _moment(started[:8], started[8:].split("+")[0].split("-")[0], "Radiopharmaceutical Start DateTime")
    else:
        time = _text(tracer, "RadiopharmaceuticalStartTime")
        given = _moment(_text(dataset, "SeriesDate"), time, "Radiopharmaceutical Start Time")
        if given > scan:  # the day before
            given -= timedelta(days=1)
    if not timedelta() <= scan - given < timedelta(days=1):
        raise UnsupportedPixels("the administration is not within the day before the scan")
    return (scan - given).total_seconds()


def _moment(date: str, time: str, name: str) -> datetime:
    whole, _, fraction = time.partition(".")
    if len(date) == 8 and len(whole) in (2, 4, 6) and (fraction.isdigit() or not fraction):
        try:
            # No zone: both moments are the same clock's.
            moment = datetime.strptime(date + whole.ljust(6, "0"), "%Y%m%d%H%M%S")  # noqa: DTZ007
        except ValueError:
            pass
        else:
            return moment + timedelta(seconds=float(f"0.{fraction or 0}"))
    raise UnsupportedPixels(f"{name} is missing or none")


def _positive(dataset: Any, keyword: str) -> float:
    try:
        number = float(dataset.get(keyword))
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UnsupportedPixels(f"{keyword} is missing or no positive number")
    return number


def _text(dataset: Any, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip(" \0")
