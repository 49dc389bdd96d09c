"""The work folder of the back-test: what was trained and scored, found again by content.

    sets/<key>/<ASSET>_<hf|lf>/…   model sets, as in `models/`
    scores/<ASSET>_<hf|lf>_<key>.jsonl   one line per prompt, appended as it is scored
    last_run.json                   the settings of the newest run, and whether it ended

A key (`content_keys`) is a hash of everything that the content depends on. So a run
that was interrupted goes on where it stopped, and nothing is ever mixed with the work
of other settings or of other code.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from config import Frequency
from domain import FloatArray, ForecastRequest
from errors import DataError, StateError
from state_store import make_folder, write_atomically
from wire_format import format_iso

MINER_NAME: Final = "lgbm-miner"  # as the official back-tester will call it
PREDICTIONS: Final = Path("miner_outputs") / MINER_NAME / "predictions"

# ---------------------------------------------------------------- folders


def sets_folder(work_dir: Path, key: str) -> Path:
    """Where the model sets of a key are published."""
    return work_dir / "sets" / key


def scores_file(work_dir: Path, asset: str, frequency: Frequency, key: str) -> Path:
    """Where the scores of a key are collected."""
    return work_dir / "scores" / f"{asset}_{frequency.value}_{key}.jsonl"


def load_scores(file: Path) -> dict[int, dict[str, Any]]:
    """Scored prompts by start time; a line that was cut off is left out, the last of two wins."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StateError(f"{file} cannot be read ({error.strerror}); remove it.") from None
    found = {}
    for line in lines:
        try:
            entry = orjson.loads(line)
            found[int(entry["start_ts"])] = entry
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a crash: the prompt is scored again
    return found


def append_score(file: Path, entry: Mapping[str, Any]) -> None:
    """Add one prompt, in one write: processes may append side by side.

    The line begins with a line break too, so that one that was cut off before it
    spoils nothing. Raises: StateError.
    """
    try:
        make_folder(file.parent)
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, b"\n" + orjson.dumps(entry) + b"\n")
        finally:
            os.close(handle)
    except OSError as error:
        raise StateError(
            f"{file} cannot be written ({error.strerror}); free some space or name another "
            "--work-dir."
        ) from None


# ---------------------------------------------------------------- runs


def interrupted_run(work_dir: Path) -> dict[str, Any] | None:
    """The settings of the newest run in the folder, if it did not end."""
    try:
        run = orjson.loads((work_dir / "last_run.json").read_bytes())
        return None if run["ended"] else dict(run["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_run(work_dir: Path, settings: Mapping[str, Any], *, ended: bool) -> None:
    """Remember the newest run. Raises: StateError."""
    document = {"settings": settings, "ended": ended}
    data = orjson.dumps(document, option=orjson.OPT_INDENT_2)
    write_atomically(work_dir / "last_run.json", data)


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """What two sets of settings differ in, e.g. `seed 0, now 1`."""
    names: Iterable[str] = dict.fromkeys((*left, *right))
    return [
        f"{name} {_shown(left.get(name))}, now {_shown(right.get(name))}"
        for name in names
        if left.get(name) != right.get(name)
    ]


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "none"


# ---------------------------------------------------------------- predictions for others


def prediction_file(folder: Path, request: ForecastRequest) -> Path:
    """Where the official back-tester looks for the answer to a request."""
    moment = format_iso(request.start_ts).replace("T", "_").removesuffix("+00:00")
    return folder / PREDICTIONS / f"{moment}Z_{request.asset}_{request.length_s}.json"


def load_prediction(file: Path) -> FloatArray | None:
    """The paths of an exported prediction; None if there is no such file.

    Raises: DataError if there is one that is no prediction.
    """
    try:
        return np.array(orjson.loads(file.read_bytes())["paths"], dtype=np.float64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{file} is in the way and is no prediction; remove it or export to another folder."
        ) from None


def export_prediction(folder: Path, request: ForecastRequest, paths: FloatArray) -> None:
    """Write an answer in the layout of the official back-tester.

    `paths` (n, points), prices as sent. Raises: DataError if another answer to the same
    prompt is there; StateError.
    """
    file = prediction_file(folder, request)
    present = load_prediction(file)
    if present is not None:
        require_same_prediction(file, same=np.array_equal(present, paths))
        return
    document = {
        "start_timestamp": format_iso(request.start_ts),
        "asset": request.asset,
        "time_increment": request.increment_s,
        "time_length": request.length_s,
        "num_simulations": len(paths),
        "num_steps": request.n_points - 1,
        "paths": paths,
    }
    write_atomically(file, orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))


def require_same_prediction(file: Path, *, same: bool) -> None:
    """Raises: DataError unless the prediction that is there is the `same` as ours."""
    if not same:
        raise DataError(
            f"{file} holds another answer to this prompt; remove it or export to another folder."
        )
