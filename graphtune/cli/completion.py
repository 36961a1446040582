"""What the shell offers for CONFIG: names of the catalogue, and YAML files."""

from pathlib import Path

from graphtune.config import catalogue, models, techniques


def config_names(incomplete: str) -> list[str]:
    """Names and files that begin as `incomplete` does, a model's techniques once it is named."""
    known = models()
    names = [name for name in catalogue() if not name.startswith("techniques/")]
    names += [
        f"{model}_{technique}"
        for model in known
        if incomplete.startswith(model)
        for technique in techniques()
    ]
    folder, _, start = incomplete.rpartition("/")
    try:
        beside = sorted(Path(folder or ".").iterdir())
    except OSError:  # not a folder, so no files in it
        beside = []
    prefix = f"{folder}/" if folder else ""
    files = [
        f"{prefix}{path.name}{'/' if path.is_dir() else ''}"
        for path in beside
        if path.name.startswith(start) and (path.is_dir() or path.suffix in (".yaml", ".yml"))
        if start.startswith(".") or not path.name.startswith(".")
    ]
    return sorted({name for name in [*names, *files] if name.startswith(incomplete)})
