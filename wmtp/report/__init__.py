"""Reports for people: a run's data and summary in a terminal, and pages of its token weights."""

from wmtp import on_demand

__getattr__ = on_demand(
    __name__,
    step_page="TokenWeightPages",
    token_views="TokenView",
    token_weights="token_weights_html",
    tokens="token_pieces token_table",
)
