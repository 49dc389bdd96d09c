"""Trained models: loading a set, and predicting centre and scale with it.

On disk a set is one folder, `models/<ASSET>_<hf|lf>/<model id>/`:

    manifest.json       what it is: feature names, file hashes, window, metrics
    calibration.json    clock, unit, log-linear blend, controller, path shape
    scale.txt           LightGBM correction of the scale, pooled over lead buckets
    centre_<lead>.txt   LightGBM expected return, one per anchor lead (seconds)

`models/<ASSET>_<hf|lf>/current.json` names the set in use and the one before.
Loading refuses a set whose hashes or feature names do not match.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lightgbm
import numpy as np
import orjson
from lightgbm import Booster
from scipy.interpolate import PchipInterpolator

from config import FREQUENCIES, Frequency, FrequencySpec
from domain import FloatArray
from errors import ModelError
from features import FeatureFrame, Standardiser, feature_names
from model_store import MANIFEST, digest, is_sealed, read_model_file
from path_simulator import PathShape
from uncertainty_engine import (
    Controller,
    LogLinearScale,
    blend_log_levels,
    bucket_centres,
    bucket_design,
    weigh_blend,
)

SCHEMA: Final = 3
CALIBRATION: Final = "calibration.json"
SCALE_MODEL: Final = "scale.txt"

EXTRA_SCALE_NAMES: Final = ("log_lead_bars", "linear_log_level")
EXTRA_CENTRE_NAMES: Final = ("log_lead_bars",)


def centre_file(lead_s: int) -> str:
    """File name of the centre model of an anchor lead."""
    return f"centre_{lead_s}.txt"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Everything fitted but the trees; enough for a forecast without LightGBM."""

    standardiser: Standardiser
    linear: tuple[LogLinearScale, ...]  # one per lead bucket
    blend_shares: FloatArray  # (buckets,): how much of it counts beside the single EWMA, 0 to 1
    scale_strength: float  # share of LightGBM's correction that is applied, 0 to 1
    centre_weights: Mapping[int, float]  # by anchor lead in seconds, 0 to 1
    controller: Controller  # as it stood when training ended
    controller_gain: float
    path_shape: PathShape

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "standardiser": self.standardiser.to_dict(),
            "linear": [part.to_dict() for part in self.linear],
            "blend_shares": self.blend_shares.tolist(),
            "scale_strength": self.scale_strength,
            "centre_weights": {str(lead): w for lead, w in self.centre_weights.items()},
            "controller": self.controller.to_dict(),
            "controller_gain": self.controller_gain,
            "path_shape": self.path_shape.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Inverse of `to_dict`."""
        return cls(
            standardiser=Standardiser.from_dict(values["standardiser"]),
            linear=tuple(LogLinearScale.from_dict(part) for part in values["linear"]),
            blend_shares=np.array(values["blend_shares"], dtype=np.float64),
            scale_strength=float(values["scale_strength"]),
            centre_weights={int(k): float(v) for k, v in values["centre_weights"].items()},
            controller=Controller.from_dict(values["controller"]),
            controller_gain=float(values["controller_gain"]),
            path_shape=PathShape.from_dict(values["path_shape"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelSet:
    """One trained set, ready to predict."""

    model_id: str
    asset: str
    frequency: Frequency
    source: str
    feed: str
    trained_from: int
    trained_until: int
    calibration: Calibration
    scale_model: Booster | None  # None: the trees are missing, the rest answers
    centre_models: Mapping[int, Booster]

    @property
    def spec(self) -> FrequencySpec:
        """How the set's frequency is modelled."""
        return FREQUENCIES[self.frequency]

    @property
    def complete(self) -> bool:
        """Whether the LightGBM models are there."""
        return self.scale_model is not None

    def linear_log_levels(self, frame: FeatureFrame) -> FloatArray:
        """Log mean |z| without LightGBM: the single EWMA and the blend; (buckets, n)."""
        return self._weighed(self._blend(frame), frame)

    def log_levels(self, frame: FeatureFrame) -> FloatArray:
        """Log mean |z| per lead bucket, LightGBM's correction included; (buckets, n)."""
        blend = self._blend(frame)
        levels = self._weighed(blend, frame)
        if self.scale_model is None or self.calibration.scale_strength == 0.0:
            return levels
        design = np.vstack(
            [scale_design(self.spec, frame, bucket, blend[bucket]) for bucket in range(len(blend))]
        )
        raw = np.asarray(self.scale_model.predict(design, raw_score=True), dtype=np.float64)
        return blend_log_levels(levels, raw.reshape(levels.shape), self.calibration.scale_strength)

    def _blend(self, frame: FeatureFrame) -> FloatArray:
        """The log-linear blend at full share; (buckets, n)."""
        return np.stack(
            [
                part.log_level(bucket_design(frame, bucket))
                for bucket, part in enumerate(self.calibration.linear)
            ]
        )

    def _weighed(self, blend: FloatArray, frame: FeatureFrame) -> FloatArray:
        return weigh_blend(blend, fallback_log_level(frame), self.calibration.blend_shares)

    def centre_in_scale(self, frame: FeatureFrame) -> dict[int, float]:
        """Expected return at the anchor leads for the frame's last row.

        In units of `level · √seasonal variance`, shrunk by validation skill;
        leads without skill are 0.
        """
        expected = {}
        for lead_s, weight in self.calibration.centre_weights.items():
            value = 0.0
            if weight > 0.0 and lead_s in self.centre_models:
                bars = np.array([lead_s // self.spec.bar_s])
                row = centre_design(frame.last().shared, bars)
                value = weight * float(np.asarray(self.centre_models[lead_s].predict(row))[0])
            expected[lead_s] = value
        return expected


def fallback_log_level(frame: FeatureFrame) -> FloatArray:
    """Log mean |z| by the single EWMA; (n,)."""
    return np.asarray(np.log(np.maximum(frame.level, 1e-3)), dtype=np.float64)


def scale_design(
    spec: FrequencySpec, frame: FeatureFrame, bucket: int, linear_log_level: FloatArray
) -> Any:
    """Rows of the scale model; (n, features) float32."""
    own = np.hstack([frame.shared, frame.by_bucket[bucket]])
    design = np.empty((len(own), own.shape[1] + len(EXTRA_SCALE_NAMES)), dtype=np.float32)
    bucket_part(design)[:] = own
    set_extra_columns(design, spec, bucket, linear_log_level)
    return design


def bucket_part(design: Any) -> Any:
    """The columns of scale model rows that are the features of their lead bucket."""
    return design[:, : -len(EXTRA_SCALE_NAMES)]


def set_extra_columns(
    design: Any, spec: FrequencySpec, bucket: int, linear_log_level: FloatArray
) -> None:
    """Set what rows of the scale model have beside the features of their lead bucket."""
    design[:, -2] = np.log(bucket_centres(spec)[bucket])
    design[:, -1] = linear_log_level


def centre_design(shared: Any, lead_bars: Any) -> Any:
    """Rows of a centre model from those of the shared features; (n, features) float32."""
    return np.column_stack([shared, np.log(lead_bars).astype(np.float32)])


def scale_names(spec: FrequencySpec) -> list[str]:
    """Feature names of the scale model, in order."""
    shared, by_bucket = feature_names(spec)
    return [*shared, *by_bucket, *EXTRA_SCALE_NAMES]


def centre_names(spec: FrequencySpec) -> list[str]:
    """Feature names of the centre models, in order."""
    return [*feature_names(spec)[0], *EXTRA_CENTRE_NAMES]


def lead_layout(spec: FrequencySpec) -> dict[str, Any]:
    """What the rows of a set's models stand for; plain values for its manifest."""
    return {
        "bar_s": spec.bar_s,
        "leads_s": list(spec.leads_s),
        "bucket_ends": list(spec.bucket_ends),
    }


def interpolate_centre(anchors: Mapping[float, float], leads_s: FloatArray) -> FloatArray:
    """Centre path (bps) at any leads from its values at the anchor leads.

    Shape-preserving between anchors, so that it never overshoots; from 0 at
    lead 0 to the first; flat after the last: an expected drift that was not
    learned does not go on. `leads_s` (n,) seconds; returns (n,).
    Source: Fritsch & Butland (1984), SIAM J. Sci. Stat. Comput. 5(2).
    """
    if not any(anchors.values()):
        return np.zeros(len(leads_s))
    knots = np.array([0.0, *anchors])
    values = np.array([0.0, *anchors.values()])
    curve = PchipInterpolator(knots, values)
    return np.asarray(curve(np.clip(leads_s, 0.0, knots[-1])), dtype=np.float64)


# ---------------------------------------------------------------- loading


def load_model_set(folder: Path) -> ModelSet:
    """Load one set completely.

    Raises: ModelError if a file is missing or damaged, or if the set was made
    for other features than this version computes; UnreadableModel if a file may be
    sound and cannot be read.
    """
    manifest = _read_manifest(folder)
    calibration = _load_calibration(folder, manifest)
    boosters = {
        name: _load_booster(folder, manifest, name)
        for name in manifest["files"]
        if name.endswith(".txt")
    }
    centre = {lead: boosters[centre_file(lead)] for lead in calibration.centre_weights}
    return _assemble(manifest, calibration, boosters[SCALE_MODEL], centre)


def load_without_trees(folder: Path) -> ModelSet:
    """Load what answers without LightGBM, when its files are damaged.

    Raises: ModelError if the manifest or the calibration is damaged too, UnreadableModel
    if one cannot be read.
    """
    manifest = _read_manifest(folder)
    return _assemble(manifest, _load_calibration(folder, manifest), None, {})


def _assemble(
    manifest: dict[str, Any],
    calibration: Calibration,
    scale_model: Booster | None,
    centre_models: Mapping[int, Booster],
) -> ModelSet:
    return ModelSet(
        model_id=manifest["model_id"],
        asset=manifest["asset"],
        frequency=Frequency(manifest["frequency"]),
        source=manifest["source"],
        feed=manifest["feed"],
        trained_from=int(manifest["trained_from"]),
        trained_until=int(manifest["trained_until"]),
        calibration=calibration,
        scale_model=scale_model,
        centre_models=centre_models,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    data = read_model_file(path)
    try:
        manifest = orjson.loads(data)
    except ValueError:
        raise ModelError(f"{path} is not valid JSON; train the set again.") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ModelError(
            f"{path} has schema {schema!r}, this version reads {SCHEMA}; train the set again."
        )
    if not is_sealed(data):
        raise ModelError(
            f"{path} does not have the hash that it records; it was damaged or changed: "
            "train the set again."
        )
    _check_features(path, manifest)
    return dict(manifest)


def _check_features(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a set that was trained on other features or leads than are computed now."""
    spec = FREQUENCIES[Frequency(manifest["frequency"])]
    computed = {"scale": scale_names(spec), "centre": centre_names(spec)}
    for kind, names in computed.items():
        trained = manifest["features"][kind]
        if trained != names:
            raise ModelError(
                f"{path} was made for {len(trained)} {kind} features that differ from the "
                f"{len(names)} of this version in name or order; train the set again."
            )
    if manifest["leads"] != lead_layout(spec):
        raise ModelError(
            f"{path} was made for other leads or lead buckets than this version uses; "
            "train the set again."
        )


def _read_checked(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    path = folder / name
    data = read_model_file(path)
    if digest(data) != manifest["files"].get(name):
        raise ModelError(
            f"{path} does not have the hash that its manifest records; it was damaged or "
            "changed: train the set again."
        )
    return data


def _load_calibration(folder: Path, manifest: dict[str, Any]) -> Calibration:
    data = _read_checked(folder, manifest, CALIBRATION)
    return Calibration.from_dict(orjson.loads(data))


def _load_booster(folder: Path, manifest: dict[str, Any], name: str) -> Booster:
    text = _read_checked(folder, manifest, name).decode("utf-8")
    try:
        booster = Booster(model_str=text)
    except lightgbm.basic.LightGBMError as error:
        raise ModelError(f"{folder / name}: {error}; train the set again.") from None
    kind = "scale" if name == SCALE_MODEL else "centre"
    if booster.feature_name() != manifest["features"][kind]:
        raise ModelError(
            f"{folder / name} was trained on other features than its manifest names; "
            "train the set again."
        )
    return booster
