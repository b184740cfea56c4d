"""`report`: how results are shown. Nothing here changes one."""

from __future__ import annotations

from typing import Literal

from clusterbatch.config.base import Section, operational


class ReportConfig(Section):
    language: Literal["en", "ja"] = operational("en")
    # Its first group, found in a query's id, names the segment (source) the query belongs to; the built-in sample's ids
    # are <source>-q<16 hex digits>. Gains are shown by segment where ids match.
    segment_pattern: str = operational(r"^(.+?)-[dq]?[0-9a-f]{16}$")
