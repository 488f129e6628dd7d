"""Rotary positions in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` of transformers 5."""

from __future__ import annotations

from typing import Any

from pretrain.huggingface.architecture import Inexpressible, Json, Settings

LLAMA3 = {
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}


def write_rope(ours: Settings) -> Json:
    """Raises Inexpressible for other positions than rope's."""
    if ours["positions"] != "rope":
        raise Inexpressible("positions", ours["positions"], "it can be 'rope'")
    base, scaling = ours["rope_base"], ours["rope_scaling"]
    if scaling is None:
        return {"rope_theta": base}
    if scaling["kind"] == "ntk":  # is another base, by kernels/rotary.py; theirs of that name changes with the length
        size = ours["head_size"]
        return {"rope_theta": base * scaling["factor"] ** (size / (size - 2))}
    theirs: Json = {"rope_type": scaling["kind"], "factor": scaling["factor"]}
    if scaling["kind"] == "llama3":
        theirs |= {name: scaling[key] for key, name in LLAMA3.items()}
    return {"rope_theta": base, "rope_scaling": theirs}


def read_rope(theirs: Json) -> Settings:
    """Raises Inexpressible for a scaling that is not ours."""
    scaling = dict(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
    base = theirs.get("rope_theta", scaling.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    ours: dict[str, Any] | None = None
    if kind in ("linear", "llama3"):
        ours = {"kind": kind, "factor": scaling["factor"]}
    elif kind != "default":
        raise Inexpressible("rope_scaling.rope_type", kind, "it can be 'default' or 'linear' or 'llama3'")
    if kind == "llama3":
        assert ours is not None
        ours |= {key: scaling[name] for key, name in LLAMA3.items()}
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise Inexpressible("partial_rotary_factor", scaling["partial_rotary_factor"], "it can be 1.0")
    return {"positions": "rope", "rope_base": base, "rope_scaling": ours}
