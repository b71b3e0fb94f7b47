"""Nothing secret in what a run writes down, sends or says."""

import os
import re
from urllib.parse import quote

_NAME = re.compile(r"(^|_)(KEY|KEY_ID|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)$|PASSWORD$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]*(?=@)")
_SHORTEST = 8  # a shorter value is a word: to mask it would mangle the text, and no service gives out such a key
_MASK = "***"


def mask_secrets(text: str) -> str:
    """The text without secrets: ``***`` in their place.

    A secret is the value, of 8 characters or more, of an environment variable named like one (``*_KEY``, ``*_KEY_ID``,
    ``*_SECRET``, ``*_TOKEN``, ``*PASSWORD``), as it is or percent-encoded, and the ``user:password`` of a URL.
    """
    values = {value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= _SHORTEST}
    values |= {quote(value, safe="") for value in values}
    for value in sorted(values, key=len, reverse=True):  # one may hold another
        text = text.replace(value, _MASK)
    return _IN_URL.sub(_MASK, text)
