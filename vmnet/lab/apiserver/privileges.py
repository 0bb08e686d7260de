"""Rights beside those of the request itself: over signers, and over the owners that an object names.

They are the real server's admission plugins CertificateApproval, CertificateSigning and
OwnerReferencesPermissionEnforcement. Not every cluster has switched on the last: here it is, so that a role that
suffices here suffices everywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from vmnet.lab.apiserver.authorization import Attributes
from vmnet.lab.apiserver.resources import Registry, ResourceInfo
from vmnet.lab.apiserver.status import forbidden
from vmnet.lab.apiserver.storage import Object

Permits = Callable[[Attributes], bool]
"""Whether the one who asks may do something."""

_REQUESTS: Final = ("certificates.k8s.io", "certificatesigningrequests")


def concerned(info: ResourceInfo, subresource: str, body: bytes) -> bool:
    """Whether such a write may need more rights; ``body`` is what was sent."""
    return (info.storage_key == _REQUESTS and subresource != "") or b"blockOwnerDeletion" in body


def check(
    registry: Registry, info: ResourceInfo, subresource: str, new: Object, old: Object | None, permits: Permits
) -> None:
    """Raises ApiError (403) where a right is missing."""
    name = str(new["metadata"]["name"])
    if info.storage_key == _REQUESTS and subresource:
        _check_signer(info, name, subresource, new, old, permits)
    known = {_identity(item) for item in _blocking(old)} if old is not None else set()
    namespace = str(new["metadata"].get("namespace", ""))
    for reference in _blocking(new):
        if _identity(reference) in known:
            continue
        group = str(reference["apiVersion"]).rpartition("/")[0]
        owner = registry.by_kind(group, str(reference["kind"]))
        if owner is None:
            text = "cannot set blockOwnerDeletion in this case because cannot find RESTMapping for "
            raise forbidden(info, name, f"{text}APIVersion {reference['apiVersion']} Kind {reference['kind']}")
        where = namespace if owner.namespaced else ""
        asked = Attributes("update", group, owner.plural, "finalizers", where, str(reference["name"]))
        if not permits(asked):
            text = "cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on"
            raise forbidden(info, name, f"{text}: , <nil>")


def _check_signer(
    info: ResourceInfo, name: str, subresource: str, new: Object, old: Object | None, permits: Permits
) -> None:
    signer = str(new["spec"]["signerName"])
    before, after = ((item.get("status") or {}) if item else {} for item in (old, new))
    if subresource == "approval":
        verb, text = "approve", "user not permitted to approve requests with signerName"
    elif before.get("certificate") != after.get("certificate"):
        verb, text = "sign", "user not permitted to sign requests with signerName"
    else:
        return
    # A right for a whole domain of signers is one for each of them.
    for named in (signer, f"{signer.partition('/')[0]}/*"):
        if permits(Attributes(verb, info.group, "signers", name=named)):
            return
    raise forbidden(info, name, f'{text} "{signer}"')


def _blocking(obj: Object | None) -> list[Mapping[str, Any]]:
    references = (obj or {}).get("metadata", {}).get("ownerReferences") or ()
    return [item for item in references if item.get("blockOwnerDeletion")]


def _identity(reference: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(reference.get(key) for key in ("apiVersion", "kind", "name", "uid"))
