"""Cut networks as files: safetensors and JSON, never pickle, exact to the bit.

A saved network is a directory::

    model.safetensors     every tensor of the state dict, tied tensors once
    buffers.safetensors   buffers that are not in the state dict (rotary frequencies, masks); only where there are any
    plan.json             kept units, shapes, attributes, checksums, floor, certificate, seeds, data fingerprints, versions
    result.json, report.html and whatever else the caller hands over

It is written beside its place and renamed, so that it is there whole or not at all. It holds no code: `load` needs the
function that makes the architecture, and runs one that a file names only where it is resect's own.
"""

from resect.exporting.loading import load, load_plan, make_dense, make_example
from resect.exporting.naming import named_function, nearest
from resect.exporting.onnx import export_onnx
from resect.exporting.panels import check_panel_writable, load_panel, save_panel
from resect.exporting.plan_file import is_saved, read_plan
from resect.exporting.saving import check_writable, save

__all__ = [
    "check_panel_writable",
    "check_writable",
    "export_onnx",
    "is_saved",
    "load",
    "load_panel",
    "load_plan",
    "make_dense",
    "make_example",
    "named_function",
    "nearest",
    "read_plan",
    "save",
    "save_panel",
]
