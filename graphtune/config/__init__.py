"""Configs: read a YAML file with overrides, check it against a schema, build what it names."""

from graphtune.config.compose import catalogue, config_text, models, techniques
from graphtune.config.instantiate import Component, component, instantiate
from graphtune.config.keys import close_match, did_you_mean
from graphtune.config.names import foreign_code
from graphtune.config.parse import load_config
from graphtune.config.schema import SCHEMAS, LoaderConfig, ModelConfig, SFTConfig, option
from graphtune.config.validate import check_options, to_plain, to_yaml, validate

__all__ = [
    "SCHEMAS",
    "Component",
    "LoaderConfig",
    "ModelConfig",
    "SFTConfig",
    "catalogue",
    "check_options",
    "close_match",
    "component",
    "config_text",
    "did_you_mean",
    "foreign_code",
    "instantiate",
    "load_config",
    "models",
    "option",
    "techniques",
    "to_plain",
    "to_yaml",
    "validate",
]
