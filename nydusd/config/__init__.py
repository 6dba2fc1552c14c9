"""Configuration: v2 JSON, v2 TOML and v1 JSON become one typed, checked `Config`."""

from nydusd.config.load import (
    load_config,
    load_config_file,
    localfs_dir_config,
    settings_of,
    with_registry_auth,
    with_settings,
)
from nydusd.config.model import Config
from nydusd.config.node import bare_config
from nydusd.config.redacted import redacted, secret_values, settings_secrets

__all__ = (
    "Config",
    "bare_config",
    "load_config",
    "load_config_file",
    "localfs_dir_config",
    "redacted",
    "secret_values",
    "settings_of",
    "settings_secrets",
    "with_registry_auth",
    "with_settings",
)
