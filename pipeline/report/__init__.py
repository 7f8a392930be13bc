"""One page on a run: what ran on what, how it learned, how it compares. Self-contained HTML, and Markdown."""

from pydantic import Field

from pipeline.core.config import Params


class ReportParams(Params):
    """Section `report`."""

    title: str = Field(min_length=1)
    audit: bool = Field(default=True, description="verify every artifact, which reads all of their bytes")
