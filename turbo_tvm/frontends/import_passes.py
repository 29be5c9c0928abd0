"""Passes that an import runs: what they find says what a request may hold, and how to feed the compiled model.

`images` is for both importers, `texts` and `tabulated` are for ONNX files alone: in those, positions and token types
are arithmetic inside the graph, where PyTorch modules are given them by a wrapper.
"""

from __future__ import annotations

import tvm
from tvm import ir

from turbo_tvm.ops.entry import ENCODE
from turbo_tvm.passes.canonicalize import canonicalize
from turbo_tvm.passes.extract_inputs import Positions, extract_inputs
from turbo_tvm.passes.fuse_patches import Patches, fuse_patches
from turbo_tvm.passes.module_pass import Reporting, step
from turbo_tvm.passes.tabulate_positions import tabulate_positions


def images(mod: ir.IRModule) -> tuple[ir.IRModule, Patches | None]:
    """Put patches in the place of pixels; their sizes become `RequestLimits.image`. None: the graph has no patches."""
    patches = Reporting(fuse_patches, ENCODE)
    mod = tvm.transform.Sequential([step(canonicalize, ENCODE), patches.step], name="import")(mod)
    return mod, patches.report


def texts(mod: ir.IRModule, longest: int | None) -> tuple[ir.IRModule, Positions | None]:
    """Make position ids and token types inputs; how the positions are counted becomes `Imported.positions`.

    longest: what the graph otherwise allows, in tokens; None if that is not known.
    """
    positions = Reporting(extract_inputs, ENCODE, *([] if longest is None else [longest]))
    mod = tvm.transform.Sequential([step(canonicalize, ENCODE), positions.step], name="import")(mod)
    return mod, positions.report


def tabulated(mod: ir.IRModule, max_length: int) -> ir.IRModule:
    """Compute what follows from positions alone once, as a table of `max_length` rows; needs the model's limits."""
    return step(tabulate_positions, ENCODE, max_length)(mod)
