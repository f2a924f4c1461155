"""Values other than a plain rescale: lookup tables, real-world mappings, uptake, floats; exact, or refused by name."""

from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import msgspec
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut
from pydicom.sequence import Sequence
from pydicom.uid import ParametricMapStorage

from cache.dicom.assemble import VolumeOptions
from cache.dicom.header import read_header
from cache.errors import BadSource, IrregularSeries, UnsupportedPixels

from .conftest import Array, rewritten, volume_of

REAL_WORLD = VolumeOptions(units="real_world")
SUVBW = VolumeOptions(units="suvbw")


def lut(entries: int, first: int, bits: int, data: bytes) -> Sequence:
    one = Dataset()
    one.add_new("LUTDescriptor", "US", [entries % 65536, first % 65536, bits])
    one.ModalityLUTType = "US"
    one.add_new("LUTData", "OW", data)
    return Sequence([one])


def with_table(data: bytes, table: Sequence, **changes: Any) -> bytes:
    return rewritten(
        data, RescaleSlope=None, RescaleIntercept=None, RescaleType=None, ModalityLUTSequence=table, **changes
    )


@pytest.mark.parametrize(
    ("bits", "width", "dtype"),
    [(8, 1, "int16"), (8, 2, "int16"), (12, 2, "int16"), (15, 2, "int16"), (16, 2, "float32")],
)
def test_a_modality_lut_is_looked_up(phantom: list[bytes], bits: int, width: int, dtype: str) -> None:
    """Values are those of the table, also for stored values below its first entry and past its last."""
    table = np.random.default_rng(bits).integers(0, 1 << bits, 1000).astype(f"<u{width}")
    data = with_table(phantom[3], lut(1000, 300, bits, table.tobytes()))
    plan, volume = volume_of([data])
    ds = pydicom.dcmread(BytesIO(data))
    assert plan.spec.dtype == dtype
    assert np.array_equal(volume[0], table[np.clip(ds.pixel_array.astype(int) - 300, 0, 999)])
    if bits == 16:
        assert np.array_equal(volume[0], apply_modality_lut(ds.pixel_array, ds))
    assert volume_of([data], VolumeOptions(rescale=False))[0].spec.dtype == "uint16"


def test_a_table_may_begin_below_zero(phantom: list[bytes]) -> None:
    """The first value mapped is signed where the samples are (PS3.3 §C.11.1.1.1)."""
    table = np.arange(4096, dtype="<u2")[::-1].copy()
    data = with_table(phantom[3], lut(4096, -2048, 16, table.tobytes()), PixelRepresentation=1)
    ds = pydicom.dcmread(BytesIO(data))
    assert np.array_equal(volume_of([data])[1][0], table[ds.pixel_array.astype(int) + 2048])


def test_monochrome1_is_inverted_before_its_table(phantom: list[bytes]) -> None:
    """Inversion is of stored values; the table is looked up with what it gives."""
    table = (np.arange(4096) * 3 % 4096).astype("<u2")
    data = with_table(phantom[3], lut(4096, 0, 16, table.tobytes()), PhotometricInterpretation="MONOCHROME1")
    stored = pydicom.dcmread(BytesIO(data)).pixel_array
    assert np.array_equal(volume_of([data])[1][0], table[stored])
    assert np.array_equal(volume_of([data], VolumeOptions(monochrome1="invert"))[1][0], table[4095 - stored])


@pytest.mark.parametrize(
    "table",
    [lut(4096, 0, 16, bytes(8190)), lut(10, 0, 17, bytes(20)), Sequence([]), Sequence([Dataset()])],
    ids=["short", "17 bits", "no item", "empty item"],
)
def test_a_table_that_lies_is_refused(phantom: list[bytes], table: Sequence) -> None:
    """A table shorter than its descriptor says, or none, is never applied in part; stored values stay available."""
    data = with_table(phantom[3], table)
    with pytest.raises(UnsupportedPixels, match="Modality LUT"):
        volume_of([data])
    assert volume_of([data], VolumeOptions(rescale=False))[1].any()


def test_a_real_modality_lut(testdata: Path) -> None:
    """A secondary capture with a table of 4096 entries from -2048 on gives pydicom's values."""
    data = (testdata / "dicom" / "single" / "pydicom-data__mlut_18.dcm").read_bytes()
    ds = pydicom.dcmread(BytesIO(data))
    plan, image = volume_of([data], VolumeOptions(kind="image"))
    assert plan.spec.axes == "yx"
    assert np.array_equal(image, apply_modality_lut(ds.pixel_array, ds))


def mapping(slope: float, intercept: float, code: str = "mm2/s") -> Dataset:
    one, units = Dataset(), Dataset()
    units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = code, "UCUM", code
    one.MeasurementUnitsCodeSequence = Sequence([units])
    one.LUTLabel = one.LUTExplanation = "ADC"
    one.add_new("RealWorldValueFirstValueMapped", "US", 0)
    one.add_new("RealWorldValueLastValueMapped", "US", 4095)
    one.RealWorldValueSlope, one.RealWorldValueIntercept = slope, intercept
    return one


def test_a_real_world_mapping_is_applied_on_demand(phantom: list[bytes]) -> None:
    """It replaces the rescale where it is asked for, by highdicom's values; without that it changes nothing."""
    objects = [
        rewritten(data, RealWorldValueMappingSequence=Sequence([mapping(0.25 + number, -3.5)]))
        for number, data in enumerate(phantom)
    ]
    plan, volume = volume_of(objects, REAL_WORLD)
    datasets = [pydicom.dcmread(BytesIO(data)) for data in objects]
    expected = highdicom.get_volume_from_series(datasets, apply_real_world_transform=True)
    assert (plan.spec.dtype, plan.spec.units) == ("float32", "mm2/s")
    assert np.array_equal(volume, expected.array.astype(np.float32))
    assert np.array_equal(volume_of(objects)[1], volume_of(phantom)[1])


def test_several_mappings_or_none_are_refused(phantom: list[bytes]) -> None:
    """Where nothing says which mapping to take, or there is none, there are no such values."""
    two = rewritten(phantom[0], RealWorldValueMappingSequence=Sequence([mapping(1, 0), mapping(2, 0)]))
    for data in (two, phantom[0]):
        with pytest.raises(UnsupportedPixels, match="Real World"):
            volume_of([data], REAL_WORLD)


def test_slices_of_different_units_are_refused(phantom: list[bytes]) -> None:
    """A volume measures one thing."""
    objects = [
        rewritten(data, RealWorldValueMappingSequence=Sequence([mapping(1, 0, "1" if number else "s")]))
        for number, data in enumerate(phantom)
    ]
    with pytest.raises(IrregularSeries, match="units"):
        volume_of(objects, REAL_WORLD)


def tracer(**changes: Any) -> Dataset:
    one = Dataset()
    one.RadionuclideTotalDose, one.RadionuclideHalfLife = "350000000", "6586.2"
    one.RadiopharmaceuticalStartTime = "110000.00"
    for keyword, value in changes.items():
        setattr(one, keyword, value)
    return one


def pet(data: bytes, slope: str = "2.5", **changes: Any) -> bytes:
    """A PET slice of a patient of 75 kg, an hour and a half after the injection of 350 MBq of F-18."""
    given = {
        "Modality": "PT",
        "Units": "BQML",
        "RescaleType": None,
        "RescaleSlope": slope,
        "RescaleIntercept": "0",
        "CorrectedImage": ["NORM", "DTIM", "ATTN", "SCAT", "DECY"],
        "DecayCorrection": "START",
        "PatientWeight": "75",
        "SeriesDate": "20240301",
        "SeriesTime": "123000",
        "AcquisitionDate": "20240301",
        "AcquisitionTime": "123000.5",
        "RadiopharmaceuticalInformationSequence": Sequence([tracer()]),
    }
    return rewritten(data, **(given | changes))


def stored(data: bytes) -> Array:
    array: Array = pydicom.dcmread(BytesIO(data)).pixel_array.astype(np.float64)
    return array


def test_suvbw_is_qibas(phantom: list[bytes]) -> None:
    """Body weight over the dose decayed until the scan, with the rescale of each slice, rounded once."""
    objects = [pet(data, slope=f"{1 + number}.25") for number, data in enumerate(phantom)]
    plan, volume = volume_of(objects, SUVBW)
    factor = 75 * 1000 / (350e6 * 2 ** (-5400 / 6586.2))
    assert (plan.spec.dtype, plan.spec.units) == ("float32", "g/ml")
    for piece in plan.slices:
        number = plan.objects[piece.object].member
        assert np.allclose(volume[piece.at], stored(objects[number]) * (1.25 + number) * factor, rtol=1e-6)
    assert volume_of(objects)[0].spec.units == "BQML"


@pytest.mark.parametrize(
    ("changes", "dose"),
    [
        ({"DecayCorrection": "ADMIN"}, 350e6),
        (
            {"RadiopharmaceuticalInformationSequence": Sequence([tracer(RadiopharmaceuticalStartTime="233000")])},
            350e6 * 2 ** (-46800 / 6586.2),
        ),
        (
            {
                "RadiopharmaceuticalInformationSequence": Sequence(
                    [tracer(RadiopharmaceuticalStartDateTime="20240301120000.00+0100")]
                )
            },
            350e6 * 2 ** (-1800 / 6586.2),
        ),
    ],
    ids=["corrected to the administration", "given the day before", "with a date"],
)
def test_the_dose_is_that_of_the_correction(phantom: list[bytes], changes: dict[str, Any], dose: float) -> None:
    """The dose decays to the moment that the values are corrected to, over midnight if need be."""
    data = pet(phantom[5], **changes)
    assert np.allclose(volume_of([data], SUVBW)[1][0], stored(data) * 2.5 * 75000 / dose, rtol=1e-6)


def test_values_in_g_per_ml_are_suv(phantom: list[bytes]) -> None:
    """A scanner that writes SUV needs neither weight nor dose."""
    data = pet(phantom[5], Units="GML", PatientWeight=None, RadiopharmaceuticalInformationSequence=None)
    assert np.array_equal(volume_of([data], SUVBW)[1], volume_of([data])[1])


SEQUENCE = "RadiopharmaceuticalInformationSequence"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"Units": "CNTS"}, "Units"),
        ({"CorrectedImage": ["ATTN"]}, "Corrected Image"),
        ({"CorrectedImage": "DECY"}, "Corrected Image"),
        ({"CorrectedImage": None}, "Corrected Image"),
        ({"DecayCorrection": "NONE"}, "Decay Correction"),
        ({"PatientWeight": None}, "PatientWeight"),
        ({"PatientWeight": "0"}, "PatientWeight"),
        ({"SeriesTime": None}, "Series Date or Time"),
        ({"SeriesTime": "1230x0"}, "Series Date or Time"),
        ({"AcquisitionDate": None}, "Acquisition Date or Time"),
        ({"SeriesTime": "130000"}, "Series Time is after"),
        ({SEQUENCE: None}, "Radiopharmaceutical Information"),
        ({SEQUENCE: Sequence([tracer(), tracer()])}, "Radiopharmaceutical Information"),
        ({SEQUENCE: Sequence([tracer(RadionuclideTotalDose=None)])}, "RadionuclideTotalDose"),
        ({SEQUENCE: Sequence([tracer(RadionuclideHalfLife=None)])}, "RadionuclideHalfLife"),
        ({SEQUENCE: Sequence([tracer(RadiopharmaceuticalStartTime=None)])}, "Radiopharmaceutical Start Time"),
        ({SEQUENCE: Sequence([tracer(RadiopharmaceuticalStartDateTime="20240201120000")])}, "day before"),
        ({"Modality": "CT"}, "not PT"),
    ],
    ids=str,
)
def test_no_suvbw_without_all_it_takes(phantom: list[bytes], changes: dict[str, Any], named: str) -> None:
    """Whatever is missing or says something else is named, and the values in Bq/ml stay available."""
    data = pet(phantom[5], **changes)
    with pytest.raises(UnsupportedPixels, match=named) as refusal:
        volume_of([data], SUVBW)
    assert refusal.value.instances
    assert volume_of([data])[1].any()


def test_the_weight_stays_in_the_object(phantom: list[bytes]) -> None:
    """The header holds the factor, and nothing of the patient that it was computed from."""
    header = read_header(memoryview(pet(phantom[5], PatientWeight="73.77")), 0)
    assert header.suvbw is not None
    assert "73.77" not in repr(header)


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_floats_stay_what_they_are(phantom: list[bytes], keyword: str, dtype: str) -> None:
    """Float and double float pixels keep their width and every bit, infinities and NaN included."""
    values = np.random.default_rng(1).normal(0, 1e30, (40, 48)).astype(dtype)
    values[0, :3] = np.inf, -np.inf, np.nan
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    for gone in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"):
        del ds[gone]
    ds.SOPClassUID = ParametricMapStorage
    ds.BitsAllocated = values.itemsize * 8
    setattr(ds, keyword, values.tobytes())
    out = BytesIO()
    ds.save_as(out)
    plan, volume = volume_of([out.getvalue()])
    assert plan.spec.dtype == values.dtype.name
    assert np.array_equal(volume[0], values, equal_nan=True)


def test_a_real_parametric_map(testdata: Path) -> None:
    """A map of doubles gives pydicom's values, at its place in the patient."""
    data = (testdata / "dicom" / "single" / "pydicom-data__parametric_map_double_float.dcm").read_bytes()
    plan, volume = volume_of([data])
    assert plan.spec.dtype == "float64"
    assert np.array_equal(volume[0], pydicom.dcmread(BytesIO(data)).pixel_array)
    assert plan.spec.spacing == (5.0, 0.661468, 0.661468)


@pytest.mark.parametrize("signed", [False, True])
def test_32_bits_are_exact_as_stored_and_rounded_once_as_float(phantom: list[bytes], signed: bool) -> None:
    """Samples of 32 bits keep them without rescale; with it they are float32, as everything that int16 cannot hold."""
    values = np.random.default_rng(2).integers(0, 1 << 32, (40, 48), np.uint32).view("i4" if signed else "u4")
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 32, 32, 31, int(signed)
    ds.PixelData = values.tobytes()
    ds.RescaleIntercept = "0"
    out = BytesIO()
    ds.save_as(out)
    assert np.array_equal(volume_of([out.getvalue()], VolumeOptions(rescale=False))[1][0], values)
    plan, volume = volume_of([out.getvalue()])
    assert plan.spec.dtype == "float32"
    assert np.array_equal(volume[0], values.astype(np.float32))


@pytest.mark.parametrize("syntax", ["", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80"])
@pytest.mark.parametrize(
    ("signed", "slope", "intercept"),
    [(False, 1, -32768), (False, 1, 0), (True, 1, 0), (True, -1, -1), (False, -1, 32767), (True, 1, 0)],
)
def test_the_whole_range_fits_without_wrapping(
    phantom: list[bytes], syntax: str, signed: bool, slope: int, intercept: int
) -> None:
    """Every 16-bit value comes out as arithmetic says, at the ends of int16 as in the middle."""
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).view("i2" if signed else "u2")
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    ds.Rows = ds.Columns = 256
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 15, int(signed)
    ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
    ds.PixelData = values.tobytes()
    if syntax:
        ds.compress(syntax, generate_instance_uid=False)
    out = BytesIO()
    ds.save_as(out)
    volume = volume_of([out.getvalue()])[1]
    assert np.array_equal(volume[0], values.astype(np.int64) * slope + intercept)


@pytest.mark.parametrize(
    "options",
    [
        {"units": "suvbw", "rescale": False},
        {"frames": [1]},
        {"kind": "image", "frames": [1, 2]},
        {"kind": "frames", "select": "largest"},
        {"kind": "image", "dimensions": "4d"},
    ],
    ids=str,
)
def test_options_that_contradict_are_refused(options: dict[str, Any]) -> None:
    """What no object could satisfy is refused before there is one."""
    with pytest.raises(ValueError, match=r"units|frames|kind"):
        msgspec.convert(options, VolumeOptions)


def test_what_is_refused_is_named(phantom: list[bytes]) -> None:
    """One slice without its mapping spoils the volume, and is the one named."""
    objects = [rewritten(data, RealWorldValueMappingSequence=Sequence([mapping(1, 0)])) for data in phantom]
    objects[4] = phantom[4]
    with pytest.raises(BadSource) as refusal:
        volume_of(objects, REAL_WORLD)
    assert refusal.value.instances == (pydicom.dcmread(BytesIO(phantom[4])).SOPInstanceUID,)
