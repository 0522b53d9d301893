"""Whether a fusion of given checkpoints can be done at all, found out before anything is computed."""

from __future__ import annotations

import logging
import shutil

from experiments.errors import ArtifactError, ConfigError
from experiments.fuse_config import Fusing
from tailor.checkpoint import Checkpoint
from tailor.errors import CheckpointError
from tailor.method import is_separable
from tailor.methods.stitched import Stitched

log = logging.getLogger(__name__)


def check(parts: Fusing) -> None:
    """Before any stage: raises ConfigError if the settings don't fit each other."""
    is_stitched = isinstance(parts.method, Stitched)
    if is_stitched != (len(parts.finetuned) > 1):
        raise ConfigError(
            f"finetuned: {len(parts.finetuned)} given, and this baseline "
            + ("stitches several; name them as [A,B]" if is_stitched else "takes one; choose a baseline that stitches")
        )
    if parts.method.needs == "nothing" and (parts.calibration.data is not None or parts.calibration.retain is not None):
        log.warning("this baseline needs no samples: calibration is not looked at")
    if parts.patch is not None and parts.out_dtype != "pretrained":
        raise ConfigError("patch: is one of the pretrained weights as they are, so out_dtype must be pretrained")
    if parts.patch is not None and parts.patch == parts.out:
        raise ConfigError(f"patch={parts.patch}: is also out; give them different names")
    if parts.calibration.inputs == "sequential" and (is_stitched or not is_separable(parts.method)):
        raise ConfigError("calibration.inputs=sequential: this baseline can't take layers one by one")


def require_room(parts: Fusing) -> None:
    """Before anything is computed: raises CheckpointError if an output exists, ArtifactError if it can't fit."""
    for target in (parts.out, parts.patch):
        if target is not None and (target.exists() or target.is_symlink()):
            raise CheckpointError(f"{target}: already exists; remove it or choose another name")
    if parts.out is not None:
        needed = sum(form.nbytes for form in Checkpoint(parts.pretrained).forms().values())
        parent = next(path for path in parts.out.absolute().parents if path.exists())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ArtifactError(
                f"{parts.out}: needs {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free; free some space "
                "or write elsewhere"
            )
