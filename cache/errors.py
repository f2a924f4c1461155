"""Every way voxcache says no.

    VoxcacheError                   a failure that nothing here foresaw: the log says more
    ├── BadRequest                  the caller asked for something that cannot be
    │   ├── MalformedUid            a UID that PS3.5 §9.1 does not allow
    │   ├── MalformedReference      a reference that does not name study, series and recipe
    │   ├── UnknownRecipe           a recipe that no configuration defines
    │   ├── UnknownModel            a model that no recipe ends in
    │   ├── UnknownNamespace        a namespace that no configuration defines
    │   ├── RangeNotSatisfiable     a byte range outside the tensor
    │   └── Unauthorized            the request does not show that it knows the secret it needs
    ├── Forbidden                   well asked, but the settings do not allow it
    ├── NotFound                    well asked, but it is not there
    │   ├── UnknownStudy            the origin holds nothing of the study
    │   ├── EmptySeries             the study is there, the series has no objects
    │   ├── UnknownVersion          a source version that is not the series' own now, and is not held either
    │   ├── UnknownLease            never given, or released
    │   └── LeaseExpired            its time is over: ask for a new one
    ├── BadSource                   the objects themselves are at fault; a retry will not help
    │   ├── BadManifest             a manifest object that does not follow its schema
    │   ├── NotDicom                bytes that are no DICOM file
    │   ├── TruncatedObject         a file that ends before its data does
    │   ├── UnsupportedPixels       no decoder for the transfer syntax or sample layout
    │   ├── UndecodablePixels       a codestream its decoder refuses
    │   └── IrregularSeries         the instances do not form one regular volume
    │       ├── MissingSlice        a gap between neighbouring slices
    │       ├── DuplicateSlice      two slices at one place
    │       ├── MixedOrientations   slices that do not lie parallel
    │       ├── MixedSizes          slices of several sizes or pixel spacings
    │       ├── TiltedSeries        slices sheared against their normal (gantry tilt)
    │       └── SeveralVolumes      several echoes, time points or acquisitions
    ├── OriginError                 the system of record did not deliver
    │   ├── OriginDenied            credentials or policy
    │   ├── Archived                the objects are in an archive, and have to be restored before they can be read
    │   ├── Restoring               the objects are being brought back from an archive: ask again later
    │   ├── OriginDown              unreachable, stalled or failing after retries
    │   └── OriginChanged           an object is not what its manifest says any more
    ├── Refused                     asked rightly, but not now, or not with these budgets
    │   ├── AllPinned               every byte that could make room is in use: retry later
    │   ├── Overloaded              too much is queued already: retry later
    │   │   └── Shed                arrivals come faster than they can be taken: send again later
    │   ├── DiskFailing             the NVMe disk is late or fails: it is left alone until a probe goes well
    │   ├── QueueDown               the arrival queue cannot be used: nothing is accepted that could be lost
    │   ├── DeadlinePassed          the caller's own deadline came first
    │   ├── OverQuota               more would be pinned than retention.quota allows: unpin something
    │   └── TooLarge                larger than the tiers can ever hold
    ├── WorkerFailed                a decode or recipe job ended badly; only its own request fails
    │   ├── WorkerDied              its process ended: a decoder crashed, or the kernel killed it
    │   ├── WorkerTimeout           longer than workers.job_timeout_s
    │   └── WorkerOutOfMemory       more memory than workers.job_memory
    ├── TritonError                 the inference server did not answer as it should
    │   ├── TritonDown              unreachable
    │   │   └── TritonLost          it broke off during a call
    │   ├── ModelChanged            the model was loaded anew meanwhile: ask again
    │   └── TritonRefused           Triton answered with an error of its own
    ├── NotConfirmed                a publisher's subscription could not be confirmed: it has to ask again
    ├── CorruptEntry                a stored entry fails its checksum: quarantined, made again
    ├── NotReproduced               made again of the same objects, an entry has other bytes: it is set aside
    └── ConfigError                 settings that cannot work; raised at start only

Foreign exceptions are mapped to these at the seam where they arise. Messages name studies by UID and say what to
do; they never hold patient data. ``code`` is stable: it ends the problem type of HTTP answers.
"""

from typing import ClassVar


class VoxcacheError(Exception):
    """Root of every error voxcache raises on purpose. ``retry_after_s`` is set when waiting helps."""

    code: ClassVar[str] = "error"
    retry_after_s: float | None = None


class BadRequest(VoxcacheError):
    code = "bad-request"


class MalformedUid(BadRequest):
    code = "malformed-uid"


class MalformedReference(BadRequest):
    code = "malformed-reference"


class UnknownRecipe(BadRequest):
    code = "unknown-recipe"


class UnknownModel(BadRequest):
    code = "unknown-model"


class UnknownNamespace(BadRequest):
    code = "unknown-namespace"


class RangeNotSatisfiable(BadRequest):
    """A byte range outside the tensor, which holds ``nbytes`` bytes (RFC 9110 §14.4)."""

    code = "range-not-satisfiable"

    def __init__(self, message: str, nbytes: int) -> None:
        super().__init__(message)
        self.nbytes = nbytes


class Unauthorized(BadRequest):
    code = "unauthorized"


class Forbidden(VoxcacheError):
    code = "forbidden"


class NotFound(VoxcacheError):
    code = "not-found"


class UnknownStudy(NotFound):
    code = "unknown-study"


class EmptySeries(NotFound):
    code = "empty-series"


class UnknownVersion(NotFound):
    code = "unknown-version"


class UnknownLease(NotFound):
    code = "unknown-lease"


class LeaseExpired(NotFound):
    code = "lease-expired"


class BadSource(VoxcacheError):
    """``instances`` names the SOP Instance UIDs (or object keys, where no UID could be read) at fault."""

    code = "bad-source"

    def __init__(self, message: str, instances: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.instances = instances


class BadManifest(BadSource):
    code = "bad-manifest"


class NotDicom(BadSource):
    code = "not-dicom"


class TruncatedObject(BadSource):
    code = "truncated-object"


class UnsupportedPixels(BadSource):
    code = "unsupported-pixels"


class UndecodablePixels(BadSource):
    code = "undecodable-pixels"


class IrregularSeries(BadSource):
    code = "irregular-series"


class MissingSlice(IrregularSeries):
    code = "missing-slice"


class DuplicateSlice(IrregularSeries):
    code = "duplicate-slice"


class MixedOrientations(IrregularSeries):
    code = "mixed-orientations"


class MixedSizes(IrregularSeries):
    code = "mixed-sizes"


class TiltedSeries(IrregularSeries):
    code = "tilted-series"


class SeveralVolumes(IrregularSeries):
    code = "several-volumes"


class OriginError(VoxcacheError):
    code = "origin-error"


class OriginDenied(OriginError):
    code = "origin-denied"


class Archived(OriginError):
    """``restore_requested``: somebody asked for the objects already."""

    code = "archived"

    def __init__(self, message: str, *, restore_requested: bool = False) -> None:
        super().__init__(message)
        self.restore_requested = restore_requested


class Restoring(OriginError):
    """They are expected in ``retry_after_s``, and looked for again in ``look_again_s``."""

    code = "restoring"

    def __init__(self, message: str, *, retry_after_s: float, look_again_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.look_again_s = look_again_s


class OriginDown(OriginError):
    code = "origin-down"
    retry_after_s = 5.0


class OriginChanged(OriginError):
    code = "origin-changed"
    retry_after_s = 1.0


class Refused(VoxcacheError):
    code = "refused"


class AllPinned(Refused):
    code = "all-pinned"
    retry_after_s = 1.0


class Overloaded(Refused):
    code = "overloaded"
    retry_after_s = 1.0


class DiskFailing(Refused):
    code = "disk-failing"
    retry_after_s = 5.0


class Shed(Overloaded):
    code = "shed"
    retry_after_s = 2.0


class QueueDown(Refused):
    code = "queue-down"
    retry_after_s = 5.0


class DeadlinePassed(Refused):
    code = "deadline-passed"


class OverQuota(Refused):
    code = "over-quota"


class TooLarge(Refused):
    code = "too-large"


class WorkerFailed(VoxcacheError):
    code = "worker-failed"


class WorkerDied(WorkerFailed):
    code = "worker-died"


class WorkerTimeout(WorkerFailed):
    code = "worker-timeout"


class WorkerOutOfMemory(WorkerFailed):
    code = "worker-out-of-memory"


class TritonError(VoxcacheError):
    code = "triton-error"


class TritonDown(TritonError):
    code = "triton-down"
    retry_after_s = 2.0


class TritonLost(TritonDown):
    """The connection broke after the call was sent: it may still run, and read what it was given."""

    code = "triton-lost"


class ModelChanged(TritonError):
    code = "model-changed"
    retry_after_s = 1.0


class TritonRefused(TritonError):
    """Triton's own refusal, passed on with its HTTP ``status`` and message."""

    code = "triton-refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotConfirmed(VoxcacheError):
    code = "not-confirmed"
    retry_after_s = 5.0


class CorruptEntry(VoxcacheError):
    code = "corrupt-entry"


class NotReproduced(VoxcacheError):
    code = "not-reproduced"


class ConfigError(VoxcacheError):
    code = "config-error"


def every_error(root: type[VoxcacheError] = VoxcacheError) -> list[type[VoxcacheError]]:
    """The tree above as a list, parents first: what the documentation and the wire mapping are checked against."""
    return [root, *(found for child in root.__subclasses__() for found in every_error(child))]
