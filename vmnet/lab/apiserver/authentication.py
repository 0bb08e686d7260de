"""Who asks: bearer tokens of a token file, and tokens the API itself issued to service accounts."""

import base64
import csv
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.lab.apiserver.status import ApiError

ADMIN: Final = "kubernetes-admin"
MASTERS: Final = "system:masters"
"""The group that may do everything."""
_AUTHENTICATED: Final = "system:authenticated"
NODE_NAME: Final = "authentication.kubernetes.io/node-name"
_NODE_UID: Final = "authentication.kubernetes.io/node-uid"
_POD_NAME: Final = "authentication.kubernetes.io/pod-name"
_POD_UID: Final = "authentication.kubernetes.io/pod-uid"
AUDIENCE: Final = "https://kubernetes.default.svc"


@dataclass(frozen=True, slots=True)
class User:
    """An identity."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = (_AUTHENTICATED,)
    extra: tuple[tuple[str, str], ...] = ()
    """What else the token tells, e.g. the node of the pod that it was made for."""

    def as_json(self) -> dict[str, Any]:
        """``userInfo`` of reviews."""
        found: dict[str, Any] = {"username": self.name}
        if self.uid:
            found["uid"] = self.uid
        found["groups"] = list(self.groups)
        if self.extra:
            found["extra"] = {key: [value] for key, value in self.extra}
        return found


@dataclass(frozen=True, slots=True)
class _Issued:
    user: User
    audiences: tuple[str, ...]
    expires: float


def unauthorized() -> ApiError:
    """401."""
    return ApiError(401, "Unauthorized", "Unauthorized")


class Tokens:
    """The tokens that are accepted. The file is ``token,user,uid,"group,group"`` a line, as kube-apiserver reads it.

    A fifth column (``key=value,…``), which that ignores, is what else the token tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._users: dict[str, User] = {}
        self._issued: dict[str, _Issued] = {}
        self._changed = 0
        if not path.exists():
            self._write({ADMIN: secrets.token_urlsafe(32)})
        self._read()

    def _write(self, tokens: Mapping[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", newline="") as file:
            for user, token in tokens.items():
                csv.writer(file).writerow([token, user, user, MASTERS])

    def _read(self) -> None:
        self._changed = self.path.stat().st_mtime_ns
        users: dict[str, User] = {}
        with self.path.open(newline="") as file:
            for row in csv.reader(file):
                if len(row) < 2:
                    continue
                groups = tuple(name for name in (row[3] if len(row) > 3 else "").split(",") if name)
                pairs = [item.partition("=") for item in (row[4] if len(row) > 4 else "").split(",") if item]
                extra = tuple((key, value) for key, _, value in pairs)
                users[row[0]] = User(row[1], row[2] if len(row) > 2 else "", (*groups, _AUTHENTICATED), extra)
        self._users = users

    @property
    def admin(self) -> str:
        """The administrator's token."""
        return next((token for token, user in self._users.items() if MASTERS in user.groups), next(iter(self._users)))

    def token_of(self, user: str) -> str | None:
        """The token of a user of the file."""
        return next((token for token, found in self._users.items() if found.name == user), None)

    def authenticate(self, header: str | None) -> User:
        """The user of an ``Authorization`` header. Raises ApiError (401)."""
        scheme, _, token = (header or "").partition(" ")
        if scheme.lower() != "bearer":
            raise unauthorized()
        found = self.lookup(token.strip())
        if found is None:
            raise unauthorized()
        return found[0]

    def lookup(self, token: str) -> tuple[User, tuple[str, ...]] | None:
        """User and audiences of a token; None if it is not valid (any more). The file is read again if it changed."""
        user = self._users.get(token)
        if user is None and self.path.exists() and self.path.stat().st_mtime_ns != self._changed:
            self._read()
            user = self._users.get(token)
        if user is not None:
            return user, (AUDIENCE,)
        issued = self._issued.get(token)
        if issued is None:
            return None
        if issued.expires < time.time():
            del self._issued[token]
            return None
        return issued.user, issued.audiences

    def account(self, namespace: str, name: str, node: str = "") -> str:
        """A token of a service account that lasts, as if for a pod on ``node``; kept in the file."""
        user = f"system:serviceaccount:{namespace}:{name}"
        extra = ((NODE_NAME, node),) if node else ()
        for token, found in self._users.items():
            if (found.name, found.extra) == (user, extra):
                return token
        made = secrets.token_urlsafe(32)
        groups = ",".join(_account_groups(namespace))
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([made, user, "", groups, ",".join(f"{key}={value}" for key, value in extra)])
        self._read()
        return made

    def issue(
        self,
        namespace: str,
        name: str,
        uid: str,
        audiences: tuple[str, ...],
        seconds: int,
        extra: tuple[tuple[str, str], ...] = (),
    ) -> str:
        """A token for a service account that expires."""
        groups = (*_account_groups(namespace), _AUTHENTICATED)
        user = User(f"system:serviceaccount:{namespace}:{name}", uid, groups, extra)
        token = secrets.token_urlsafe(48)
        self._issued[token] = _Issued(user, audiences, time.time() + seconds)
        return token

    def revoke(self, uid: str) -> None:
        """Forget the tokens of a service account that is gone."""
        self._issued = {token: issued for token, issued in self._issued.items() if issued.user.uid != uid}


def _account_groups(namespace: str) -> tuple[str, str]:
    return "system:serviceaccounts", f"system:serviceaccounts:{namespace}"


def bound_to(kind: str, metadata: Mapping[str, Any], node: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """What a token tells that is bound to a Pod (on ``node``, the metadata of one, if it is bound) or to a Node."""
    found: list[tuple[str, str]] = []
    if kind == "Pod":
        found += [(_POD_NAME, metadata["name"]), (_POD_UID, metadata["uid"])]
    place = metadata if kind == "Node" else node
    if place is not None:
        found += [(NODE_NAME, place["name"]), (_NODE_UID, place["uid"])]
    return tuple(found)


def write_kubeconfig(path: Path, url: str, authority: bytes, token: str, *, user: str = ADMIN) -> None:
    """A kubeconfig that is complete in itself: the authority's certificate is in it."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "vmnet-lab",
                "cluster": {"server": url, "certificate-authority-data": base64.b64encode(authority).decode()},
            }
        ],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": "vmnet-lab", "context": {"cluster": "vmnet-lab", "user": user}}],
        "current-context": "vmnet-lab",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        yaml.safe_dump(content, file, sort_keys=False)
    temporary.replace(path)
