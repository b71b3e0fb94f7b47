"""The prompts of an evaluation as a file, for a server to answer: what comes back is judged as ``samples=FILE``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.errors import DiskError, ExistsError, UserError
from wmtp.eval.protocols import Protocol, Task
from wmtp.files import require_file, write_whole
from wmtp.storage.names import is_remote


def write_prompts(
    path: str,
    tasks: Sequence[Task],
    protocol: Protocol,
    tokenizer,
    *,
    num_samples: int,
    temperatures: Sequence[float],
    top_p: float,
    max_new_tokens: int,
    seed: int,
    overwrite: bool = False,
) -> int:
    """Writes a JSON line for each task and temperature; returns their number.

    Beside ``task_id`` and ``token_ids`` a line has the fields of a request to an OpenAI-compatible server: ``prompt``
    (a text to continue) or ``messages`` (of a chat, with ``chat_template_kwargs`` where the protocol has any), ``n``,
    ``temperature``, ``top_p``, ``max_tokens``, ``stop``, ``seed``. ``token_ids`` is the prompt as this project's
    tokenizer has it, a beginning-of-text token included where the model expects one: servers take it in the place of
    ``prompt``, and add nothing to it.

    Raises:
        UserError: the path is a folder or not local, a file that is not to be replaced, or cannot be written.
    """
    if is_remote(path):
        raise UserError(f"prompts must be a local file, got {path}")
    require_file(Path(path), "prompts")
    if Path(path).exists() and not overwrite:
        raise ExistsError(f"prompts={path} is there already; name another file, or set overwrite=true")
    lines = []
    for task in tasks:
        rendered = protocol.render(task)
        asked: dict[str, Any] = {
            "task_id": task.task_id,
            "prompt" if isinstance(rendered, str) else "messages": rendered,
            "token_ids": protocol.prompt(task, tokenizer),
            "n": num_samples,
        }
        if protocol.chat.get("arguments"):
            asked["chat_template_kwargs"] = dict(protocol.chat["arguments"])
        rest = {"top_p": top_p, "max_tokens": max_new_tokens, "stop": list(protocol.stop), "seed": seed}
        lines += [json.dumps(asked | {"temperature": temperature} | rest) + "\n" for temperature in temperatures]
    try:
        write_whole(Path(path), "".join(lines))
    except OSError as error:
        raise DiskError(f"prompts={path} cannot be written: {error.strerror}; name another file") from error
    return len(lines)
