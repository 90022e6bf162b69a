"""Tool calls as text: the formats in which models write them, found out from their chat templates.

A format's parser reads what its writer and its grammar give: a template's format is the one whose parser finds the
calls that the template was given. Text that no parser can read stays text.
"""

from sinkrt.text.said import ToolCall
from sinkrt.text.tools.calls import Tool
from sinkrt.text.tools.facts import ToolFacts, call_probes, tool_facts_of
from sinkrt.text.tools.formats import ToolFormat
from sinkrt.text.tools.harmony import HARMONY_MARKS, Harmony, HarmonySplitter
from sinkrt.text.tools.splitter import ToolSplitter

__all__ = [
    "HARMONY_MARKS",
    "Harmony",
    "HarmonySplitter",
    "Tool",
    "ToolCall",
    "ToolFacts",
    "ToolFormat",
    "ToolSplitter",
    "call_probes",
    "tool_facts_of",
]
