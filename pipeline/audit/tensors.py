"""Safetensors files: readable, and finite in every value."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts import Artifact
from pipeline.audit.findings import Findings


def check_tensors(artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Check every safetensors file among `artifacts`, one tensor in memory at a time."""
    for name, artifact in artifacts.items():
        for file in sorted(artifact.manifest.files):
            if file.endswith(".safetensors"):
                _check_file(name, file, artifact.path / file, findings)


def _check_file(name: str, file: str, path: Path, findings: Findings) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if not torch.isfinite(tensors.get_tensor(key)).all():
                    findings.add(name, file, f"tensor '{key}' holds NaN or infinite values")
    except (SafetensorError, OSError) as error:
        findings.add(name, file, f"is not readable: {error}")
