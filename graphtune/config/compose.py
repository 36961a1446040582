"""The configs that come with graphtune, and how configs are put together.

A config may begin with `defaults: [NAME, ...]`: the configs it is laid over, each a name of the
catalogue or a file beside it. Later ones win over earlier ones, and the config's own keys over
all; mappings are merged, lists and other values replaced, and a component with another
`_component_` replaces the one below it, arguments and all.

The catalogue keeps a file for each model (`llama3_1/8B`) and for each technique
(`techniques/qlora`); `llama3_1/8B_qlora` names the one laid over the other.
"""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graphtune.config.instantiate import COMPONENT
from graphtune.config.keys import did_you_mean
from graphtune.errors import UserError

SUFFIX = ".yaml"
DEFAULTS = "defaults"
_TECHNIQUES = "techniques/"


def catalogue() -> dict[str, Traversable]:
    """The files that come with graphtune: name (`quickstart`, `llama3_2/1B`) -> file."""
    return dict(sorted(_walk(files("graphtune.configs"), "")))


def techniques() -> list[str]:
    """What can be put behind a model's name: `qlora` in `llama3_1/8B_qlora`."""
    return [name.removeprefix(_TECHNIQUES) for name in catalogue() if name.startswith(_TECHNIQUES)]


def models() -> list[str]:
    """The catalogue's models, such as `llama3_1/8B`."""
    return [name for name in catalogue() if "/" in name and not name.startswith(_TECHNIQUES)]


def read_config(name_or_path: str) -> DictConfig:
    """A config with its `defaults` laid under it.

    A path is taken as it is where it exists. `configs/quickstart.yaml` and `quickstart.yaml`
    also find the catalogue's `quickstart`, so that the repository's commands work outside it.

    Raises:
        UserError: there is neither such a file nor such a name, one that cannot be read, or
            `defaults` that lead in a circle.
    """
    path = Path(name_or_path)
    if path.is_file():
        return _resolve(path, name_or_path, ())
    if path.is_dir():
        raise UserError(f"config `{name_or_path}` is a folder; name a {SUFFIX} file")
    name = name_or_path.removeprefix("configs/").removesuffix(SUFFIX)
    known = catalogue()
    if name in known:
        return _resolve(known[name], name, ())
    parts = _split(name)
    if parts is None:
        composed = [f"{model}_{technique}" for model in models() for technique in techniques()]
        raise UserError(
            f"config `{name_or_path}` is neither a file nor in the catalogue"
            f"{did_you_mean(name, [*known, *composed])}"
        )
    config = DictConfig({})
    for part in parts:
        config = _lay(config, _resolve(known[part], part, ()))
    config.output_dir = f"runs/{name}"
    return config


def config_text(name_or_path: str) -> str:
    """A config as it is written, comments and all; one that is put together, as YAML."""
    path = Path(name_or_path)
    name = name_or_path.removeprefix("configs/").removesuffix(SUFFIX)
    file = path if path.is_file() else catalogue().get(name)
    if file is not None:
        return file.read_text(encoding="utf-8")
    return OmegaConf.to_yaml(read_config(name_or_path))


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            yield prefix + entry.name.removesuffix(SUFFIX), entry


def _split(name: str) -> list[str] | None:
    """`llama3_1/8B_qat_lora` -> the entries llama3_1/8B, techniques/qat and techniques/lora."""
    known = techniques()
    for model in sorted(models(), key=len, reverse=True):
        if name.startswith(f"{model}_"):
            behind = name.removeprefix(f"{model}_").split("_")
            if all(technique in known for technique in behind):
                return [model, *(_TECHNIQUES + technique for technique in behind)]
    return None


def _resolve(file: Traversable, name: str, above: tuple[str, ...]) -> DictConfig:
    """The config in `file`, over its defaults; `above` are the files that led here."""
    if str(file) in above:
        raise UserError(f"config `{name}`: its `{DEFAULTS}` lead back to itself")
    config = _read(file, name)
    below = config.pop(DEFAULTS, [])
    if isinstance(below, str) or not OmegaConf.is_list(below) and not isinstance(below, list):
        raise UserError(f"config `{name}`: `{DEFAULTS}` must be a list of configs, not {below!r}")
    result = DictConfig({})
    for entry in below:
        beside = Path(str(file)).parent / f"{str(entry).removesuffix(SUFFIX)}{SUFFIX}"
        found: Traversable | None = beside if beside.is_file() else catalogue().get(str(entry))
        if found is None:
            raise UserError(
                f"config `{name}`: `{DEFAULTS}` names `{entry}`, which is neither beside it nor in "
                f"the catalogue{did_you_mean(str(entry), catalogue())}"
            )
        result = _lay(result, _resolve(found, str(entry), (*above, str(file))))
    return _lay(result, config)


def _lay(below: DictConfig, above: DictConfig) -> DictConfig:
    """`above` over `below`; both stay as they are."""
    plain: Any = OmegaConf.to_container(below)
    merged = OmegaConf.create(_merge(plain, OmegaConf.to_container(above)))
    assert isinstance(merged, DictConfig)
    return merged


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    kind = above.get(COMPONENT)
    if kind is not None and kind != below.get(COMPONENT):
        return above  # the arguments below belong to something else
    kept = dict(below)
    for key, value in above.items():
        kept[key] = _merge(kept[key], value) if key in kept else value
    return kept


def _read(file: Traversable, name: str) -> DictConfig:
    try:
        with file.open("r", encoding="utf-8") as stream:
            config = OmegaConf.load(stream)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"config `{name}`{line} is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"config `{name}` cannot be read: {first_line}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"config `{name}` must be a mapping of keys to values, not a list")
    return config
