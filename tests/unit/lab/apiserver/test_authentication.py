"""Tokens and kubeconfigs."""

import os
import stat
from pathlib import Path

import pytest
import yaml

from vmnet.lab.apiserver.authentication import NODE_NAME, Tokens, write_kubeconfig
from vmnet.lab.apiserver.status import ApiError


def test_an_administrator_is_made_once_and_the_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "tokens.csv"
    first = Tokens(path).admin
    assert Tokens(path).admin == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_identities_of_the_file_and_changes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.csv"
    path.write_text('t1,jane,4,"lab-users"\n')
    tokens = Tokens(path)
    user = tokens.authenticate("Bearer t1")
    assert user.as_json() == {"username": "jane", "uid": "4", "groups": ["lab-users", "system:authenticated"]}
    path.write_text("t2,bob,5\n")
    os.utime(path, ns=(1, 1))
    assert tokens.authenticate("bearer t2").name == "bob"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic dDE6"])
def test_others_are_refused(tmp_path: Path, header: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        Tokens(tmp_path / "tokens.csv").authenticate(header)
    assert caught.value.code == 401


def test_issued_tokens_expire_and_can_be_revoked(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.csv")
    token = tokens.issue("a", "robot", "uid-1", ("lab",), 600)
    found = tokens.lookup(token)
    assert found is not None
    assert (found[0].name, found[1]) == ("system:serviceaccount:a:robot", ("lab",))
    assert tokens.lookup(tokens.issue("a", "robot", "uid-1", ("lab",), -1)) is None
    tokens.revoke("uid-1")
    assert tokens.lookup(token) is None


def test_a_token_that_lasts_for_an_account_on_a_node(tmp_path: Path) -> None:
    path = tmp_path / "tokens.csv"
    tokens = Tokens(path)
    first = tokens.account("a", "robot", "n1")
    assert tokens.account("a", "robot", "n2") != first
    assert Tokens(path).account("a", "robot", "n1") == first
    assert Tokens(path).authenticate(f"Bearer {first}").as_json() == {
        "username": "system:serviceaccount:a:robot",
        "groups": ["system:serviceaccounts", "system:serviceaccounts:a", "system:authenticated"],
        "extra": {NODE_NAME: ["n1"]},
    }


def test_a_kubeconfig_is_complete_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "config"
    write_kubeconfig(path, "https://127.0.0.1:1", b"certificate", "secret")
    content = yaml.safe_load(path.read_text())
    assert content["users"][0]["user"] == {"token": "secret"}
    assert content["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
