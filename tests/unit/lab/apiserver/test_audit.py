"""The audit: each thing once, in memory and in the file."""

from pathlib import Path

from vmnet.lab.apiserver.audit import Audit, read
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
