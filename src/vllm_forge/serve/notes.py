"""What a person should know of a cell before it serves: how chats behave, and open issues."""

from vllm_forge.matrix import ImageCell
from vllm_forge.patches import known_issues, read_dispositions
from vllm_forge.project import Project


def chat_note(cell: ImageCell) -> str:
    """What a chat request gets that sets nothing; "" where the line's row does not say."""
    chat = cell.line.chat
    if chat is None:
        return ""
    does, other = ("thinks", "false") if chat.thinking else ("does not think", "true")
    place = ":".join(chat.source.split(":")[:2])
    return (
        f"{does} unless a request has "
        f'"chat_template_kwargs": {{"thinking": {other}}} (vLLM {cell.line.vllm}, {place})'
    )


def issue_notes(project: Project, cell: ImageCell) -> list[dict[str, str]]:
    """Reports from elsewhere that nobody has settled on this line and SKU."""
    entries = read_dispositions(project.root / "patches" / "vllm")
    return [
        {"about": entry.about, "title": entry.title, "settled_by": decision.undecided or ""}
        for entry, decision in known_issues(entries, cell.line_name, cell.sku_name)
    ]
