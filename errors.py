"""Every failure a user can cause, as one exception tree.

    MinerError                    one sentence: what, got, limit, remedy
    ├── ConfigError               settings, environment, flags
    ├── DataError                 bars that cannot be used
    │   ├── SourceUnavailable     a feed or folder cannot be reached
    │   └── InsufficientHistory   too few bars for what was asked
    ├── RequestError              a prompt that cannot be answered as asked
    │   ├── UnknownAsset
    │   └── TooLate               the deadline has passed
    ├── NoPriceError              nothing known about the price: refuse
    ├── ModelError                a model set that is damaged or does not fit
    ├── StateError                a state file that is damaged or does not fit
    ├── BusyError                 another process holds the directory
    ├── Overloaded                more requests wait than can be served
    └── InvalidAnswer             our own answer breaks the validator's rules

Scripts turn a `MinerError` into one line on stderr and a non-zero exit code.
Anything else is a bug and keeps its traceback.
"""


class MinerError(Exception):
    """Base of all expected failures; `str(error)` is one clear sentence."""


class ConfigError(MinerError):
    """A setting, environment variable or flag has an unusable value."""


class DataError(MinerError):
    """Bars are missing, damaged or of the wrong form."""


class SourceUnavailable(DataError):
    """A feed or archive folder cannot be reached."""


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


class StateError(MinerError):
    """A state file is damaged or of an unknown schema."""


class BusyError(MinerError):
    """Another process is working on the same directory."""


class Overloaded(MinerError):
    """More requests of at least this priority are waiting than can be served."""


class InvalidAnswer(MinerError):
    """An answer of ours breaks a rule of the validator."""
