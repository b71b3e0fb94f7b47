"""What a run produced, for people: its data and its summary in a terminal, and pages of its token weights."""

from wmtp.report.preview import preview
from wmtp.report.run_summary import run_summary
from wmtp.report.step_page import TokenWeightPages
from wmtp.report.token_views import TokenView, token_pieces, token_views
from wmtp.report.token_weights import token_weights_html

__all__ = [
    "TokenView",
    "TokenWeightPages",
    "preview",
    "run_summary",
    "token_pieces",
    "token_views",
    "token_weights_html",
]
