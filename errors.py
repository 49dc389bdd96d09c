"""Every failure a user can cause, as one exception tree.

    MinerError                    one sentence: what, got, limit, remedy
    ├── ConfigError               settings, environment, flags
    │   └── BadSetting            one value; knows which
    ├── DataError                 bars that cannot be used
    │   ├── SourceUnavailable     a feed or folder cannot be reached
    │   │   ├── FeedUnreachable   no connection, or it broke off
    │   │   ├── FeedTimeout       no answer, or not all of it, in time
    │   │   ├── FeedFailed        the host reports a fault of its own (5xx)
    │   │   ├── RateLimited       the host wants fewer calls; knows how long to wait
    │   │   └── FeedRefused       the host will not answer this call, however often
    │   │       └── CountryBlocked
    │   ├── BadAnswer             a feed's answer is not of the agreed form
    │   │   └── GarbledAnswer     not even readable: cut off, broken, no JSON
    │   └── InsufficientHistory   too few bars for what was asked
    ├── RequestError              a prompt that cannot be answered as asked
    │   ├── UnknownAsset
    │   └── TooLate               the deadline has passed
    ├── NoPriceError              nothing known about the price: refuse
    ├── ModelError                a model set that is damaged or does not fit
    │   └── UnreadableModel       nothing can be read of it now; it may be sound
    ├── StateError                a state file that is damaged or does not fit
    ├── BusyError                 another process holds the directory
    ├── Overloaded                more requests wait than can be served
    ├── CallerRefused             a caller that is not answered
    │   ├── NotVerified           who asks, or when, is not proven
    │   └── NotAllowed            proven, but not one of those who may ask
    ├── ChainUnavailable          the chain cannot be read, now or ever yet
    └── InvalidAnswer             our own answer breaks the validator's rules

Scripts turn a `MinerError` into one line on stderr and a non-zero exit code.
Anything else is a bug and keeps its traceback.
"""


class MinerError(Exception):
    """Base of all expected failures; `str(error)` is one clear sentence."""


class ConfigError(MinerError):
    """A setting, environment variable or flag has an unusable value."""


class BadSetting(ConfigError):
    """One setting's value cannot be used, e.g. "seed=-1" "is out of range; use 0 to 9."."""

    def __init__(self, setting: str, subject: str, complaint: str) -> None:
        super().__init__(setting, subject, complaint)
        self.setting = setting
        self._subject = subject
        self._complaint = complaint

    def __str__(self) -> str:
        return f"{self._subject} {self._complaint}"

    def from_place(self, place: str) -> ConfigError:
        """The same, told with where the value came from."""
        return ConfigError(f"{self._subject} from {place} {self._complaint}")


class DataError(MinerError):
    """Bars are missing, damaged or of the wrong form."""


class SourceUnavailable(DataError):
    """A feed or archive folder cannot be reached."""


class FeedUnreachable(SourceUnavailable):
    """There is no connection to a feed's host, or it broke off."""


class FeedTimeout(SourceUnavailable):
    """A feed's host did not answer, or not to the end, in time."""


class FeedFailed(SourceUnavailable):
    """A feed's host reports a fault of its own (HTTP 5xx)."""


class RateLimited(SourceUnavailable):
    """A feed's host wants fewer calls."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # as the host says, real seconds


class FeedRefused(SourceUnavailable):
    """A feed's host will not answer this call; trying again changes nothing."""


class CountryBlocked(FeedRefused):
    """A feed's host does not serve this country (HTTP 451)."""


class BadAnswer(DataError):
    """A feed's answer is not of the agreed form."""


class GarbledAnswer(BadAnswer):
    """A feed's answer cannot be read at all; another try may give a whole one."""


class InsufficientHistory(DataError):
    """There are fewer bars than the task needs."""


class RequestError(MinerError):
    """A prompt that cannot be answered as asked."""


class UnknownAsset(RequestError):
    """The asset is not one that this miner can forecast."""


class TooLate(RequestError):
    """The answer could not arrive before the prompt's start time."""


class NoPriceError(MinerError):
    """No price is known for the asset, so no path can start anywhere."""


class ModelError(MinerError):
    """A model set is damaged, incomplete or made for other features."""


class UnreadableModel(ModelError):
    """A file of a model set cannot be read, by rights or by the disk; it may be sound."""


class StateError(MinerError):
    """A state file is damaged or of an unknown schema."""


class UnreadableState(StateError):
    """A state file cannot be read at all, by rights or by the disk; it may be sound."""


class BusyError(MinerError):
    """Another process is working on the same directory."""


class Overloaded(MinerError):
    """More requests of at least this priority are waiting than can be served."""


class CallerRefused(MinerError):
    """A caller that is not answered, whatever it asks."""


class NotVerified(CallerRefused):
    """The request does not prove who sent it, to whom, and when."""


class NotAllowed(CallerRefused):
    """The caller is who it says, but not one of those who may ask."""


class ChainUnavailable(MinerError):
    """The chain cannot be reached, or has not been read yet."""


class InvalidAnswer(MinerError):
    """An answer of ours breaks a rule of the validator."""
