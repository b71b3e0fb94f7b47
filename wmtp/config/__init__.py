"""A recipe's config: its files and command line, strict reading of its keys, and building of its components."""

from wmtp.config.components import build, checked, component_of
from wmtp.config.files import changed, config_changes, differences, load, parse, read_command_line
from wmtp.config.reader import ConfigError, ConfigReader, StopTraining
