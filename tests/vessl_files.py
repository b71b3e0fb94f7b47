"""Reading VESSL run files strictly: against the client's generated model, which by itself accepts any key and type.

The short forms that the service expands (an image as a string, `s3://bucket/prefix` as an import, `{secret: NAME}` as a
variable) are written out first; what is then left must be what the model describes, key by key.
"""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from urllib.parse import urlsplit

import yaml

_PLAIN = {"str": str, "int": int, "bool": bool, "object": object}
_NEEDED = ("name", "resources", "image", "run")


class BadRunFile(ValueError):
    """A run file that VESSL would not understand: where, what is there, what is allowed."""


def check_run_file(spec: object) -> None:
    """Refuse a run file with an unknown key, a value of another type, or without what a run needs."""
    _check(spec, "V1RunSpecFormBodyInput", "run file")
    missing = [key for key in _NEEDED if not spec.get(key)]
    if missing:
        raise BadRunFile(f"run file lacks {', '.join(missing)}")
    _need("resources", spec["resources"], ("cluster", "preset"))
    for number, command in enumerate(spec["run"]):
        _need(f"run.{number}", command, ("command",))


def recorded_commands(spec: dict, folder: Path) -> list[list[str]]:
    """The argument lists with which a run file's commands, executed by a shell with its env, call `tune`."""
    log = folder / "calls.jsonl"
    log.touch()
    stub = folder / "tune"
    stub.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    stub.chmod(0o755)
    env = {key: "planted" if isinstance(value, dict) else str(value) for key, value in spec.get("env", {}).items()}
    for step in spec["run"]:
        environment = {**env, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(["bash", "-euo", "pipefail", "-c", step["command"]], env=environment, check=True, timeout=300)
    return [json.loads(line) for line in log.read_text().splitlines()]


def read(path: Path) -> dict:
    """A run file, in which a key given twice is refused: YAML would keep the last one."""
    return yaml.load(path.read_text(), Loader=_NoDuplicates)


class _NoDuplicates(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise BadRunFile(f"a key is given twice in {keys}")
        return super().construct_mapping(node, deep)


def _check(value: object, kind: str, where: str) -> object:
    """The value as the client's model of that kind; lists and dicts item by item."""
    if kind in _PLAIN:
        wrong = not isinstance(value, _PLAIN[kind]) or (kind == "int" and isinstance(value, bool))
        if wrong:
            raise BadRunFile(f"{where} must be of type {kind}, got {value!r}")
        return value
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            raise BadRunFile(f"{where} must be a list, got {value!r}")
        return [_check(item, inner[1], f"{where}.{number}") for number, item in enumerate(value)]
    if inner := re.fullmatch(r"dict\[str, (.+)\]", kind):
        if not isinstance(value, dict):
            raise BadRunFile(f"{where} must be a mapping, got {value!r}")
        return {_check(key, "str", where): _check(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    model = _model(kind)
    value = _written_out(value, kind, where)
    if not isinstance(value, dict):
        raise BadRunFile(f"{where} must be a mapping, got {value!r}")
    attributes = {key: name for name, key in model.attribute_map.items()}
    unknown = [key for key in value if key not in attributes]
    if unknown:
        raise BadRunFile(f"{where} has the unknown key(s) {unknown}; known: {', '.join(sorted(attributes))}")
    items = {
        attributes[key]: _check(item, model.openapi_types[attributes[key]], f"{where}.{key}")
        for key, item in value.items()
    }
    try:
        return model(**items)
    except ValueError as error:
        raise BadRunFile(f"{where}: {error}") from error


def _written_out(value: object, kind: str, where: str) -> object:
    """The long form of what may be written shortly."""
    if kind == "V1ImageForm" and isinstance(value, str):
        return {"url": value}
    if kind == "V1EnvForm":
        if not isinstance(value, dict):
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                raise BadRunFile(f"{where} must be text, a number, {{value: ...}} or {{secret: NAME}}, got {value!r}")
            return {"source": "text", "value": str(value)}
        if set(value) not in ({"value"}, {"secret"}):
            raise BadRunFile(f"{where} must have the one key value or secret, got {sorted(value)}")
        return {"source": "secret" if "secret" in value else "text", **value}
    if kind in ("V1ImportForm", "V1ExportForm", "V1MountForm"):
        return _reference(value, where)
    return value


def _reference(value: object, where: str) -> object:
    """`s3://bucket/prefix` and its like, or the same as a mapping under its scheme's name."""
    if isinstance(value, dict) and len(value) == 1:
        scheme, content = next(iter(value.items()))
    elif isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        scheme, host, path = parts.scheme, parts.netloc, parts.path.strip("/")
        if not host or not path:
            raise BadRunFile(f"{where} must be scheme://place/name, got {value!r}")
        content = {
            "s3": {"bucket": host, "prefix": path},
            "gs": {"bucket": host, "prefix": path},
            "hf": {"url": f"https://{host}/{path}"},
            "git": {"url": f"https://{host}/{path}"},
            "volume": {"storage_name": host, "volume_name": path},
        }.get(scheme)
        if content is None:
            raise BadRunFile(f"{where} has the unknown scheme {scheme!r}; known: s3, gs, hf, git, volume")
    else:
        raise BadRunFile(f"{where} must be scheme://place/name, or a mapping with one scheme, got {value!r}")
    return {"ref_type": "volume-v2" if scheme == "volume" else scheme, scheme: content}


def _need(where: str, value: dict, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if not value.get(key)]
    if missing:
        raise BadRunFile(f"{where} lacks {', '.join(missing)}")


def _model(kind: str) -> type:
    """A class of the client's generated model, without importing the client, which would need its 26 dependencies."""
    if "vessl" not in sys.modules:
        root = Path(importlib.util.find_spec("vessl").submodule_search_locations[0])
        for name in ("vessl", "vessl.openapi_client", "vessl.openapi_client.models"):
            package = types.ModuleType(name)
            package.__path__ = [str(root.parent.joinpath(*name.split(".")))]
            sys.modules[name] = package
    words = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", kind)).lower()
    return getattr(importlib.import_module(f"vessl.openapi_client.models.{words}"), kind)
