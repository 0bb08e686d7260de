"""The audit: each thing once, in memory and in the file."""

from pathlib import Path

from vmnet.lab.apiserver.audit import Audit, Line, read, used
from vmnet.lab.apiserver.authentication import User
from vmnet.lab.apiserver.authorization import Attributes


def test_each_thing_is_noted_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    pod = Attributes("get", resource="pods", namespace="a", name="x")
    for _ in range(3):
        audit.note(User("jane"), "kubectl/v1 (linux)", pod, allowed=True)
    audit.note(User("jane"), "kubectl/v1", pod, allowed=False)
    audit.note(User("jane"), "kubectl/v1", Attributes("get", path="/metrics"), allowed=False)
    audit.close()
    lines = list(read(path))
    assert lines == list(audit.lines)
    assert [(line.agent, line.asked, line.allowed) for line in lines] == [
        ("kubectl/v1", pod, True),
        ("kubectl/v1", pod, False),
        ("kubectl/v1", Attributes("get", path="/metrics"), False),
    ]


def test_names_count_where_a_right_is_for_one_alone() -> None:
    lines = [Line("u", "a", Attributes("get", resource="secrets", name=name), True) for name in ("one", "two")]
    lines.append(Line("u", "a", Attributes("patch", resource="pods", subresource="status", name="x"), True))
    rights = [("get", "", "secrets", "one"), ("patch", "", "pods/status", "")]
    assert used(lines, rights) == {*rights, ("get", "", "secrets", "two")}
