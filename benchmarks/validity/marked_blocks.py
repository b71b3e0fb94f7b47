"""Pages of documentation in which programs write marked blocks."""

import re


def with_blocks(page: str, blocks: dict[str, str], name: str) -> str:
    """A page with what stands between ``<!-- mark -->`` and ``<!-- end -->`` written anew.

    Args:
        blocks: by mark, the lines between.
        name: of the page, for the message.

    Raises:
        ValueError: the page has a block not at all, or twice.
    """
    for mark, text in blocks.items():
        pattern = rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{name} must have one block <!-- {mark} --> ... <!-- end -->, it has {count}")
    return page
