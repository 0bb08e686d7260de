"""The API server: HTTP in front of the objects."""

import asyncio
import base64
import binascii
import contextlib
import functools
import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from vmnet.lab.apiserver import (
    crds,
    decoding,
    discovery,
    openapi,
    patches,
    pod_security,
    privileges,
    protobuf,
    representations,
    selectors,
    subresources,
    watching,
)
from vmnet.lab.apiserver.admission import Admission, Asked
from vmnet.lab.apiserver.admission_policies import AdmissionPolicies
from vmnet.lab.apiserver.aggregation import PROXIED, Handler, KubeletProxy, Mounts, NodeProxy
from vmnet.lab.apiserver.audit import Audit
from vmnet.lab.apiserver.authentication import ADMIN, MASTERS, Tokens, User, unauthorized, write_kubeconfig
from vmnet.lab.apiserver.authorization import Attributes, Authorizer, refused
from vmnet.lab.apiserver.certificates import Certificates, prepare
from vmnet.lab.apiserver.definitions import Definitions
from vmnet.lab.apiserver.garbage import Collector
from vmnet.lab.apiserver.namespaces import STANDARD, Namespaces
from vmnet.lab.apiserver.objects import NAMESPACES, SERVICES, Objects, creates_on_update
from vmnet.lab.apiserver.requests import (
    DeleteOptions,
    ListOptions,
    Representation,
    Target,
    WriteOptions,
    negotiate,
    parse_path,
)
from vmnet.lab.apiserver.resources import BUILTIN, Registry, ResourceInfo, subresource
from vmnet.lab.apiserver.service_addresses import Network, ServiceAddresses
from vmnet.lab.apiserver.status import (
    ApiError,
    Cause,
    PlainNotFound,
    bad_request,
    invalid_patch,
    method_not_allowed,
    not_found,
    success,
    unknown_resource,
)
from vmnet.lab.apiserver.storage import Object, Store

_log = logging.getLogger(__name__)

VERSION: Final = {
    "major": "1",
    "minor": "36",
    "emulationMajor": "1",
    "emulationMinor": "36",
    "minCompatibilityMajor": "1",
    "minCompatibilityMinor": "35",
    "gitVersion": "v1.36.2+vmnet-lab",
    "gitCommit": "",
    "gitTreeState": "",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}
_HEALTH: Final = ("/healthz", "/livez", "/readyz")
_OPEN: Final = ("/version", *_HEALTH)
_BODY_LIMIT: Final = 3 * 1024 * 1024
_BODY_TYPES: Final = "application/json, application/yaml, application/vnd.kubernetes.protobuf"
_PROTOBUF: Final = "application/vnd.kubernetes.protobuf"
_SHOWN_BYTES: Final = 30
"""How much of a body that cannot be parsed its error shows."""
_ONE_NAME: Final = re.compile(r"metadata\.name==?([^,=!]+)")
SERVER: Final = "vmnet-apiserver"


@dataclass(frozen=True, slots=True)
class Call:
    """One request for a resource."""

    request: web.Request
    user: User
    target: Target
    info: ResourceInfo

    @property
    def agent(self) -> str:
        """The User-Agent, which names the field manager where no other is given."""
        return self.request.headers.get("User-Agent", "")

    def write_options(self, kind: str, *, apply: bool = False) -> WriteOptions:
        """Raises ApiError."""
        query = self.request.query
        dry_runs = query.getall("dryRun", [])
        return WriteOptions.parse(query, kind, dry_runs=dry_runs, user=self.user.name, agent=self.agent, apply=apply)


class ApiServer:
    """An API server. ``directory`` holds certificates and tokens, which are made when absent.

    ``listen``: addresses and ports (0: any); ``inherited``: sockets that already listen, for example one of another
    network namespace. ``advertise`` is the address of the ``kubernetes`` Service's endpoint and of kubeconfigs.
    """

    def __init__(
        self,
        directory: Path,
        *,
        listen: Sequence[tuple[str, int]] = (("127.0.0.1", 0),),
        inherited: Sequence[socket.socket] = (),
        service_ranges: Sequence[str] = ("10.96.0.0/16",),
        advertise: str | None = None,
        hosts: Sequence[str] = (),
        node_proxy: NodeProxy | None = None,
        token_file: Path | None = None,
        audit_log: Path | None = None,
        history: int | None = None,
    ) -> None:
        self._directory = directory
        self._listen = tuple(listen)
        self._inherited = tuple(inherited)
        self._advertise = advertise
        self._ranges: list[Network] = [ipaddress.ip_network(item) for item in service_ranges]
        self._hosts = tuple(hosts)
        self.registry = Registry()
        self.store = Store(history=history) if history else Store()
        self.addresses = ServiceAddresses(self._ranges)
        self.objects = Objects(
            self.store, self.registry, self._structural, self.addresses, check_definition=_check_definition
        )
        self.definitions = Definitions(self.objects)
        self.collector = Collector(self.objects)
        self.namespaces = Namespaces(self.objects)
        self.tokens = Tokens(token_file or directory / "tokens.csv")
        self.authorizer = Authorizer(self.store)
        self.audit = Audit(audit_log)
        self.mounts = Mounts()
        self.admission = Admission(self.store)
        self.policies = AdmissionPolicies(self.store, self.registry)
        self._own_proxy = KubeletProxy(self.store, self.tokens.admin)
        self.node_proxy: NodeProxy = node_proxy or self._own_proxy
        self.scales = subresources.Scales(self.objects)
        self.pods = subresources.Pods(self.objects)
        self._certificates: Certificates | None = None
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ports: list[tuple[str, int]] = []

    def _structural(self, info: ResourceInfo) -> Any:
        return self.definitions.structural(info)

    # Life

    async def start(self) -> None:
        """Listen, and make the objects that every cluster has. Raises OSError if an address cannot be used."""
        hosts = [host for host, _ in self._listen] + [found.getsockname()[0] for found in self._inherited]
        hosts = [host for host in hosts if host not in ("0.0.0.0", "::", "")]
        firsts = [self.addresses.first(family) for family in self.addresses.families]
        if self._advertise:
            hosts.append(self._advertise)
        self._certificates = prepare(self._directory, [*hosts, *self._hosts, *firsts])
        context = self._certificates.context()
        app = web.Application(client_max_size=_BODY_LIMIT, handler_args={"access_log": None})
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0, keepalive_timeout=3600.0
        )
        await self._runner.setup()
        try:
            for host, port in self._listen:
                site: web.BaseSite = web.TCPSite(self._runner, host, port, ssl_context=context)
                await site.start()
            for found in self._inherited:
                site = web.SockSite(self._runner, found, ssl_context=context)
                await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        self._ports = [(address[0], address[1]) for address in self._runner.addresses]
        self._make_standard_objects()
        for chores in (self.definitions.chores, self.collector.chores, self.namespaces.chores):
            self._tasks.append(asyncio.get_running_loop().create_task(chores.run()))

    async def stop(self) -> None:
        """End all requests and stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        await self._own_proxy.close()
        await self.admission.close()
        self.audit.close()

    async def __aenter__(self) -> "ApiServer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        """Port of the first listener."""
        return self._ports[0][1]

    @property
    def url(self) -> str:
        """Where clients reach it."""
        host, port = self._ports[0]
        host = self._advertise or ("127.0.0.1" if host in ("0.0.0.0", "::") else host)
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"

    @property
    def certificates(self) -> Certificates:
        """The certificates in use; the server has been started."""
        if self._certificates is None:
            raise RuntimeError("the server has not been started")
        return self._certificates

    def kubeconfig(self, path: Path, *, url: str | None = None, user: str = ADMIN) -> Path:
        """Write a kubeconfig for a user of the token file (the administrator). Raises LookupError for others."""
        token = self.tokens.admin if user == ADMIN else self.tokens.token_of(user)
        if token is None:
            raise LookupError(f"no token for {user}")
        write_kubeconfig(path, url or self.url, self.certificates.authority.read_bytes(), token, user=user)
        return path

    def account_kubeconfig(self, path: Path, namespace: str, name: str, node: str = "") -> Path:
        """Write a kubeconfig for a service account, as if for a pod of it on ``node``. It needs no such object."""
        user = f"system:serviceaccount:{namespace}:{name}"
        token = self.tokens.account(namespace, name, node)
        write_kubeconfig(path, self.url, self.certificates.authority.read_bytes(), token, user=user)
        return path

    def mount(self, group: str, version: str, resources: Sequence[ResourceInfo], handler: Handler) -> None:
        """Let ``handler`` answer everything below ``/apis/<group>/<version>/``; ``resources`` appear in discovery."""
        self.mounts.handlers[group, version] = handler
        for info in resources:
            self.registry.add(info, mounted=True)

    def _make_standard_objects(self) -> None:
        options = WriteOptions(manager=SERVER, user=SERVER)
        namespaces = self._builtin("", "v1", "namespaces")
        for name in STANDARD:
            if self.store.get(NAMESPACES, ("", name)) is None:
                self.objects.create(namespaces, "", {"metadata": {"name": name}}, options)
        if self.store.get(SERVICES, ("default", "kubernetes")) is None:
            self._make_service(options)
            ranges = {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": self.addresses.ranges}}
            self.objects.create(self._builtin("networking.k8s.io", "v1", "servicecidrs"), "", ranges, options)

    def _make_service(self, options: WriteOptions) -> None:
        host, port = self._ports[0]
        host = self._advertise or host
        family = self.addresses.families[0]
        ports = [{"name": "https", "protocol": "TCP", "port": 443, "targetPort": port}]
        labels = {"component": "apiserver", "provider": "kubernetes"}
        spec = {"clusterIP": self.addresses.first(family), "ipFamilyPolicy": "SingleStack", "ports": ports}
        service = {"metadata": {"name": "kubernetes", "labels": labels}, "spec": spec}
        self.objects.create(self._builtin("", "v1", "services"), "default", service, options)
        endpoint = {
            "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": f"IPv{ipaddress.ip_address(host).version}",
            "endpoints": [{"addresses": [host], "conditions": {"ready": True}}],
            "ports": [{"name": "https", "protocol": "TCP", "port": port}],
        }
        self.objects.create(self._builtin("discovery.k8s.io", "v1", "endpointslices"), "default", endpoint, options)

    def _builtin(self, group: str, version: str, plural: str) -> ResourceInfo:
        info = self.registry.lookup(group, version, plural)
        if info is None:
            raise LookupError(plural)
        return info

    # Requests

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        representation = Representation()
        try:
            path = request.raw_path.split("?", 1)[0]
            user = self._authenticate(request, path)
            target = parse_path(path)
            user = self._authorize(request, path, user, target)
            handler = self.mounts.find(path)
            if handler is not None:
                return await handler(request)
            if target is None:
                return self._document(request, path)
            if "accept" in request.headers and target.subresource not in PROXIED:
                representation = negotiate(request.headers["Accept"])
            return await self._resource(request, user, target, representation)
        except ApiError as error:
            if request.method == "HEAD":
                return web.Response(status=error.code)
            found = Representation(representation.media)
            return representations.answer(representations.body(error.status, found), found, error.code, error.headers)
        except PlainNotFound:
            return _plain("404 page not found\n", 404)
        except (asyncio.CancelledError, ConnectionResetError, web.HTTPException):
            raise
        except Exception as error:
            _log.exception("%s %s", request.method, request.path_qs)
            if request.get(watching.STREAMING) and request.transport is not None:
                # The answer has begun, so all that is left is to end it in a way that is no regular end.
                request.transport.abort()
            status = ApiError(500, "InternalError", f"Internal error occurred: {error}").status
            return representations.answer(representations.body(status, Representation()), Representation(), 500)

    def _authenticate(self, request: web.Request, path: str) -> User:
        header = request.headers.get("Authorization")
        if header is None:
            if path in _OPEN:
                return User("system:anonymous", groups=("system:unauthenticated",))
            token = _websocket_token(request)
            if token is None:
                raise self._anonymous(request, path)
            header = f"Bearer {token}"
        return self.tokens.authenticate(header)

    def _authorize(self, request: web.Request, path: str, user: User, target: Target | None) -> User:
        """Who is taken to ask: somebody else where that is wanted and allowed. Raises ApiError (403)."""
        asked = _attributes(request, path, target)
        agent = request.headers.get("User-Agent", "")
        impersonated = _impersonated(request)
        if impersonated is not None:
            if not self.authorizer.decide(
                user, Attributes("impersonate", resource="users", name=impersonated.name)
            ).allowed:
                raise refused(user, replace(asked, verb=f"impersonate-on:user-info:{asked.verb}"))
            user = impersonated
        # Health and version are open to all; a method that no verb stands for is refused later, as such.
        open_to_all = (target is None and path.startswith(_OPEN)) or not asked.verb
        allowed = open_to_all or self.authorizer.decide(user, asked).allowed
        self.audit.note(user, agent, asked, allowed=allowed)
        if not allowed:
            raise refused(user, asked)
        return user

    def _permits(self, call: Call, asked: Attributes) -> bool:
        """Whether the one who calls may do something else too."""
        allowed = self.authorizer.decide(call.user, asked).allowed
        self.audit.note(call.user, call.agent, asked, allowed=allowed)
        return allowed

    def _anonymous(self, request: web.Request, path: str) -> ApiError:
        target = parse_path(path)
        if target is not None and self.registry.lookup(target.group, target.version, target.plural) is None:
            return unauthorized()
        return refused(User("system:anonymous"), _attributes(request, path, target))

    def _document(self, request: web.Request, path: str) -> web.StreamResponse:
        """Everything that is no resource: health, version, discovery, OpenAPI."""
        if path in _HEALTH or path.startswith(tuple(f"{item}/" for item in _HEALTH)):
            return _plain("ok")
        if request.method not in ("GET", "HEAD"):
            raise method_not_allowed()
        accept = request.headers.get("Accept", "")
        parts = path.strip("/").split("/")
        match parts:
            case [""]:
                return web.json_response({"paths": self._paths()})
            case ["version"]:
                return web.json_response(VERSION)
            case ["api"]:
                return _document(request, *discovery.core_document(self.registry, accept))
            case ["apis"]:
                return _document(request, *discovery.groups_document(self.registry, accept))
            case ["api", version]:
                return self._resource_list(request, "", version, accept)
            case ["apis", group]:
                if group not in self.registry.groups():
                    raise PlainNotFound
                return _document(request, *discovery.group_versions(self.registry, group, accept))
            case ["apis", group, version]:
                return self._resource_list(request, group, version, accept)
            case ["openapi", "v3"]:
                return _document(request, *openapi.index(self.registry))
            case ["openapi", "v3", *rest]:
                found = openapi.document(self.registry, "/".join(rest))
                if found is None:
                    raise PlainNotFound
                return _document(request, *found)
        if parts[0] in ("api", "apis") and (
            parts[0] == "api" or (len(parts) > 1 and parts[1] in self.registry.groups())
        ):
            raise unknown_resource()
        raise PlainNotFound

    def _resource_list(self, request: web.Request, group: str, version: str, accept: str) -> web.Response:
        groups = self.registry.groups()
        if group not in groups:
            raise PlainNotFound
        if version not in groups[group]:
            raise unknown_resource()
        return _document(request, *discovery.resource_list(self.registry, group, version, accept))

    def _paths(self) -> list[str]:
        found = ["/api", "/api/v1", "/apis", "/apis/", *_HEALTH, "/openapi/v3", "/openapi/v3/", "/version"]
        for group, versions in self.registry.groups().items():
            if group:
                found.append(f"/apis/{group}")
                found.extend(f"/apis/{group}/{version}" for version in versions)
        return sorted(found)

    async def _resource(
        self, request: web.Request, user: User, target: Target, representation: Representation
    ) -> web.StreamResponse:
        info = self.registry.lookup(target.group, target.version, target.plural)
        if info is None:
            if target.group and target.group not in self.registry.groups():
                raise PlainNotFound
            if target.group and not any(True for _ in self.registry.resources(target.group, target.version)):
                raise unknown_resource()
            raise unknown_resource() if _is_builtin(target.group) else PlainNotFound
        if target.namespace and not info.namespaced:
            raise PlainNotFound if self.objects.is_custom(info) else unknown_resource()
        if target.subresource and target.subresource not in info.subresources:
            raise not_found(info, target.name) if self.objects.is_custom(info) else unknown_resource()
        if info.namespaced and not target.namespace and target.name:
            raise unknown_resource() if request.method == "GET" else method_not_allowed()
        call = Call(request, user, target, info)
        if target.subresource:
            return await self._subresource(call, representation)
        verb = _verb(request, target)
        if verb not in info.verbs or (info.namespaced and not target.namespace and verb not in ("list", "watch")):
            if not (verb == "deletecollection" and verb in info.verbs):
                raise method_not_allowed()
            if info.namespaced and not target.namespace:
                raise method_not_allowed()
        match verb:
            case "get":
                return await self._get(call, representation)
            case "list" | "watch":
                return await self._list(call, representation)
            case "create":
                return await self._create(call, representation)
            case "update":
                return await self._update(call, representation)
            case "patch":
                return await self._patch(call, representation)
            case "delete":
                return await self._delete(call, representation)
            case _:
                return await self._delete_collection(call, representation)

    def _renderer(self, call: Call, representation: Representation) -> representations.Renderer:
        include = call.request.query.get("includeObject", "Metadata")
        return representations.Renderer(self.registry, call.info, representation, include)

    def _answer(
        self, call: Call, obj: Object, representation: Representation, status: int, warnings: Sequence[str] = ()
    ) -> web.Response:
        content = (
            representations.body(obj, Representation(representation.media))
            if obj.get("kind") == "Status"
            else self._renderer(call, representation).single(obj)
        )
        response = representations.answer(content, representation, status)
        self._warn(call, response, warnings)
        return response

    def _warn(self, call: Call, response: web.StreamResponse, warnings: Sequence[str] = ()) -> None:
        definition = self.registry.definition(call.info)
        found = list(warnings)
        if definition is not None and definition.get("deprecated"):
            info = call.info
            found.append(
                definition.get("deprecationWarning") or f"{info.group}/{info.version} {info.kind} is deprecated"
            )
        representations.warning_headers(response, found)

    async def _get(self, call: Call, representation: Representation) -> web.StreamResponse:
        version = call.request.query.get("resourceVersion", "")
        if version.isdigit():
            await watching.wait_for_version(self.store, int(version))
        stored = self.objects.get(call.info, call.target.namespace, call.target.name)
        response = representations.answer(self._renderer(call, representation).stored(stored), representation)
        self._warn(call, response)
        return response

    def _scope(self, call: Call, options: ListOptions) -> watching.Scope:
        definition = self.registry.definition(call.info) or {}
        selectable = tuple(item["jsonPath"].lstrip(".") for item in definition.get("selectableFields") or ())
        try:
            fields = selectors.parse_fields(options.fields, call.info, selectable)
        except ApiError:
            if definition:
                path = options.fields.split(",")[0].split("=")[0].rstrip("!")
                raise bad_request(f"field label not supported: {path}") from None
            raise
        if call.target.name:
            fields = (*fields, selectors.FieldRequirement("metadata.name", call.target.name, True))
        namespace = call.target.namespace if call.info.namespaced and call.target.namespace else None
        return watching.Scope(call.info, namespace, selectors.parse_labels(options.labels), fields)

    async def _list(self, call: Call, representation: Representation) -> web.StreamResponse:
        options = ListOptions.parse(call.request.query, watch=call.target.watch)
        scope = self._scope(call, options)
        renderer = self._renderer(call, representation)
        if options.watch:

            def prepared(response: web.StreamResponse) -> None:
                self._warn(call, response)

            return await watching.stream(call.request, self.store, scope, options, renderer, prepared)
        page = await watching.collect(self.store, scope, options)
        response = representations.answer(renderer.collection(page.items, page.metadata), representation)
        self._warn(call, response)
        return response

    async def _create(self, call: Call, representation: Representation) -> web.StreamResponse:
        info, target = call.info, call.target
        options = call.write_options("CreateOptions")
        body = await self._body(call, info.kind, options)
        if "list" not in info.verbs and info.kind != "Binding":
            now = self.objects.timestamp()
            found = subresources.review(info, body, call.user, self.tokens, self.authorizer, now)
            return self._answer(call, found, representation, 201)
        if info.kind == "Binding":
            name = ((body or {}).get("metadata") or {}).get("name", "")
            pods = self._builtin("", "v1", "pods")
            found = self.pods.bind(pods, target.namespace, name, body, dry_run=options.dry_run)
            return self._answer(call, found, representation, 201)

        if (
            info.plural == "certificatesigningrequests"
            and isinstance(body, dict)
            and isinstance(body.get("spec"), dict)
        ):
            # Who asks is what the server knows, not what the request says.
            body = {**body, "spec": {**body["spec"], **call.user.as_json()}}

        def write(how: WriteOptions) -> Object:
            return self.objects.create(info, target.namespace, body, how)

        await self._admit(call, "CREATE", options, write)
        return self._answer(call, write(options), representation, 201, options.warnings)

    async def _update(self, call: Call, representation: Representation) -> web.StreamResponse:
        options = call.write_options("UpdateOptions")
        body = await self._body(call, call.info.kind, options)
        target = call.target

        def write(how: WriteOptions) -> tuple[Object, bool]:
            return self.objects.update(call.info, target.namespace, target.name, body, how, target.subresource)

        await self._admit(call, "UPDATE", options, lambda how: write(how)[0])
        obj, created = write(options)
        return self._answer(call, obj, representation, 201 if created else 200, options.warnings)

    async def _patch(self, call: Call, representation: Representation) -> web.StreamResponse:
        media_type, content = await self._patch_body(call)
        options = call.write_options("PatchOptions", apply=media_type == patches.APPLY_PATCH)
        patch = _decoded_patch(media_type, content)
        target = call.target

        def write(how: WriteOptions) -> tuple[Object, bool]:
            return self.objects.patch(
                call.info, target.namespace, target.name, media_type, patch, how, target.subresource
            )

        await self._admit(call, "PATCH", options, lambda how: write(how)[0])
        obj, created = write(options)
        return self._answer(call, obj, representation, 201 if created else 200, options.warnings)

    async def _admit(
        self, call: Call, verb: str, options: WriteOptions, write: Callable[[WriteOptions], Object]
    ) -> None:
        """Ask the webhooks about a write that ``write`` carries out; what they change goes to ``options``.

        Raises ApiError. The object may change between this and the write, as it may not on a real server.
        """
        info, target = call.info, call.target
        stored = self.store.get(info.storage_key, (target.namespace, target.name)) if target.name else None
        operation = "CREATE" if stored is None else "UPDATE"
        if stored is None and _may_create(call, verb) and not self._permits(call, _of_call(call, "create")):
            raise refused(call.user, _of_call(call, "create"))
        content = await call.request.read()
        if privileges.concerned(info, target.subresource, content) and MASTERS not in call.user.groups:
            proposed = write(replace(options, dry_run=True, warnings=[]))
            before = stored.obj if stored is not None else None
            permits = functools.partial(self._permits, call)
            privileges.check(self.registry, info, target.subresource, proposed, before, permits)
        shape = {"CREATE": "CreateOptions", "PATCH": "PatchOptions"}.get(verb, "UpdateOptions")
        given: Object = {"kind": shape, "apiVersion": "meta.k8s.io/v1"}
        query = call.request.query
        given |= {"dryRun": ["All"]} if options.dry_run else {}
        given |= {name: query[name] for name in ("fieldManager", "fieldValidation") if query.get(name)}
        name = target.name
        asked = Asked(info, target.namespace, name, target.subresource, operation, call.user, options.dry_run, given)
        met = self.policies.meet(asked)
        hooked = self.admission.concerns(info, operation, target.subresource)
        place = self.store.get(NAMESPACES, ("", target.namespace)) if target.namespace else None
        judged = pod_security.concerned(info, operation, target.subresource, place.obj if place else None)
        if not hooked and not met and not judged:
            return
        old = stored.at(info.api_version) if stored is not None else None
        proposed = write(replace(options, dry_run=True, warnings=[]))
        asked = replace(asked, name=proposed["metadata"]["name"])
        if hooked:
            if stored is None:
                metadata = {
                    key: value for key, value in proposed["metadata"].items() if key not in ("uid", "creationTimestamp")
                }
                shown: Object = {**proposed, "metadata": metadata}
            else:
                shown = proposed
            options.mutations += await self.admission.mutate(asked, shown, old, options.warnings)
            if options.mutations:
                proposed = write(replace(options, dry_run=True, warnings=[]))
        if judged and place is not None:
            pod_security.check(info, proposed, place.obj, options.warnings)
        self.policies.check(met, asked, proposed, old, options.warnings)
        if hooked:
            await self.admission.validate(asked, proposed, old, options.warnings)

    async def _patch_body(self, call: Call) -> tuple[str, bytes]:
        media_type = call.request.headers.get("Content-Type", "").split(";")[0].strip()
        allowed = [patches.JSON_PATCH, patches.MERGE_PATCH, patches.STRATEGIC_PATCH, patches.APPLY_PATCH]
        if media_type not in allowed:
            raise ApiError(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})
        if media_type == patches.STRATEGIC_PATCH and self.objects.is_custom(call.info):
            allowed.remove(patches.STRATEGIC_PATCH)
            raise ApiError(
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: "
                + ", ".join(allowed),
            )
        return media_type, await call.request.read()

    async def _delete_options(self, call: Call) -> DeleteOptions:
        body = await self._body(call, "DeleteOptions", None)
        query = call.request.query
        return DeleteOptions.parse(body if isinstance(body, dict) else {}, query, query.getall("dryRun", []))

    async def _delete(self, call: Call, representation: Representation) -> web.StreamResponse:
        options = await self._delete_options(call)
        info, target = call.info, call.target
        given = {"kind": "DeleteOptions", "apiVersion": "meta.k8s.io/v1"}
        asked = Asked(
            info, target.namespace, target.name, "", "DELETE", call.user, dry_run=options.dry_run, options=given
        )
        met = self.policies.meet(asked)
        hooked = self.admission.concerns(info, "DELETE")
        if hooked or met:
            old = self.objects.get(info, target.namespace, target.name).at(info.api_version)
            if hooked:
                await self.admission.mutate(asked, None, old, [])
            self.policies.check(met, asked, None, old, [])
            if hooked:
                await self.admission.validate(asked, None, old, [])
        deleted = self.objects.delete(info, target.namespace, target.name, options)
        if deleted.gone and not self.objects.returns_deleted(info):
            status = success(info, target.name, deleted.obj["metadata"]["uid"])
            return self._answer(call, status, Representation(representation.media), 200)
        return self._answer(call, deleted.obj, representation, 200)

    async def _delete_collection(self, call: Call, representation: Representation) -> web.StreamResponse:
        options = await self._delete_options(call)
        selected = ListOptions.parse(call.request.query)
        page = await watching.collect(self.store, self._scope(call, selected), selected)
        for stored in page.items:
            metadata = stored.obj["metadata"]
            with contextlib.suppress(ApiError):
                self.objects.delete(call.info, metadata.get("namespace", ""), metadata["name"], options)
        renderer = self._renderer(call, representation)
        return representations.answer(renderer.collection(page.items, page.metadata), representation)

    async def _body(self, call: Call, kind: str, options: WriteOptions | None) -> Any:
        """The decoded body; None where it is empty and may be. Raises ApiError."""
        content = await call.request.read()
        media_type = call.request.headers.get("Content-Type", "").split(";")[0].strip()
        if options is None and not content:
            return None
        if media_type == _PROTOBUF or content.startswith(b"k8s\0"):
            try:
                return protobuf.decode(content)
            except (ValueError, KeyError) as error:
                raise bad_request(f"the body is no protobuf message that is understood: {error}") from error
        if media_type == "application/yaml":
            try:
                return decoding.parse_yaml(content)
            except ValueError as error:
                raise bad_request(f"error converting YAML to JSON: {error}") from error
        if media_type not in ("application/json", "") or (options is not None and not media_type):
            raise ApiError(
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: " + _BODY_TYPES,
            )
        try:
            value, duplicates = decoding.parse_json(content)
        except ValueError as error:
            shown = "<empty>"
            if content:
                cut = " ..." if len(content) > _SHOWN_BYTES else ""
                start = content[:_SHOWN_BYTES]
                shown = (start.decode(errors="replace") if content[:1] == b"{" else start.hex()) + cut
            raise bad_request(
                f"the object provided is unrecognized (must be of type {kind}): couldn't get version/kind; "
                f"json parse error: {decoding.go_json_error(error, content)} ({shown})"
            ) from error
        if value is not None and not isinstance(value, dict):
            name = "array" if isinstance(value, list) else "string" if isinstance(value, str) else "number"
            raise bad_request(
                f"the object provided is unrecognized (must be of type {kind}): couldn't get version/kind; json parse "
                f"error: json: cannot unmarshal {name} into Go value of type struct {{ APIVersion string "
                f'"json:\\"apiVersion,omitempty\\""; Kind string "json:\\"kind,omitempty\\"" }} ({content.hex()})'
            )
        if value and self.objects.is_custom(call.info) and kind == call.info.kind and not value.get("kind"):
            text = content.decode(errors="replace")
            shown = text[:_SHOWN_BYTES] + " ..." if len(text) > _SHOWN_BYTES else text
            raise bad_request(
                f"the object provided is unrecognized (must be of type {kind}): Object 'Kind' is missing in '{text}' "
                f"({shown})"
            )
        if duplicates and options is not None:
            messages = [f'duplicate field "{name}"' for name in duplicates]
            if options.validation == "Strict":
                text = f"strict decoding error: {', '.join(messages)}"
                raise decoding.cannot_handle(kind, call.info.version, text)
            if options.validation == "Warn":
                options.warnings.extend(messages)
        return value

    # Subresources

    async def _subresource(self, call: Call, representation: Representation) -> web.StreamResponse:
        info, target, request = call.info, call.target, call.request
        name = target.subresource
        found = subresource(info, name)
        verb = _verb(request, target)
        if name in PROXIED and info.plural == "pods" and not info.group:
            if verb not in found.verbs:
                raise method_not_allowed()
            stored = self.objects.get(info, target.namespace, target.name)
            if name == "log" and not (stored.obj.get("spec") or {}).get("nodeName"):
                return web.Response(status=204)
            return await self.node_proxy(request, stored.obj)
        if verb not in found.verbs:
            raise method_not_allowed()
        if name == "scale":
            return await self._scale(call, representation)
        if name in ("binding", "eviction", "token"):
            options = call.write_options("CreateOptions")
            body = await self._body(call, found.kind, options)
            if not isinstance(body, dict):
                body = {}
            if name == "binding":
                obj = self.pods.bind(info, target.namespace, target.name, body, dry_run=options.dry_run)
            elif name == "eviction":
                obj = self.pods.evict(info, target.namespace, target.name, body, dry_run=options.dry_run)
            else:
                obj = subresources.request_token(
                    self.objects, self.tokens, info, target.namespace, target.name, body, dry_run=options.dry_run
                )
            return representations.answer(representations.body(obj, representation), representation, 201)
        if name == "proxy":
            raise method_not_allowed()
        if verb == "get":
            return await self._get(call, representation)
        if verb == "update":
            return await self._update(call, representation)
        return await self._patch(call, representation)

    async def _scale(self, call: Call, representation: Representation) -> web.StreamResponse:
        info, target = call.info, call.target
        stored = self.objects.get(info, target.namespace, target.name)
        scale = self.scales.of(info, stored.at(info.api_version))
        warnings: list[str] = []
        if call.request.method == "PUT":
            options = call.write_options("UpdateOptions")
            body = await self._body(call, "Scale", options)
            scale = self.scales.write(info, target.namespace, target.name, body, options)
            warnings = options.warnings
        elif call.request.method == "PATCH":
            media_type, content = await self._patch_body(call)
            options = call.write_options("PatchOptions", apply=media_type == patches.APPLY_PATCH)
            patch = _decoded_patch(media_type, content)
            if media_type == patches.JSON_PATCH:
                result = patches.json_patch(scale, patch)
            else:
                result = patches.merge(scale, patches.require_object(patch))
            if not isinstance(result, dict):
                raise invalid_patch(result, "not a Scale")
            if (patch.get("metadata") or {}).get("resourceVersion") if isinstance(patch, dict) else False:
                pass
            else:
                result = {**result, "metadata": {}}
            scale = self.scales.write(info, target.namespace, target.name, result, options)
            warnings = options.warnings
        found = Representation(representation.media)
        response = representations.answer(representations.body(scale, found), found)
        representations.warning_headers(response, warnings)
        return response


def _decoded_patch(media_type: str, content: bytes) -> Any:
    if media_type == patches.APPLY_PATCH:
        try:
            return decoding.parse_yaml(content)
        except ValueError as error:
            message = "yaml: did not find expected key"
            raise bad_request(f"error decoding YAML: error converting YAML to JSON: {message}") from error
    try:
        return decoding.parse_json(content)[0]
    except ValueError as error:
        raise bad_request(f"error decoding patch: {decoding.go_json_error(error, content)}") from error


def _may_create(call: Call, verb: str) -> bool:
    """Whether a PUT or PATCH of something that is not there makes it, which takes that right too."""
    if verb == "PATCH":
        return call.request.headers.get("Content-Type", "").startswith(patches.APPLY_PATCH)
    return verb == "UPDATE" and creates_on_update(call.info)


def _of_call(call: Call, verb: str) -> Attributes:
    target = call.target
    return Attributes(verb, target.group, target.plural, target.subresource, target.namespace, target.name)


def _attributes(request: web.Request, path: str, target: Target | None) -> Attributes:
    """What a request asks for, as authorization sees it."""
    if target is None:
        return Attributes(request.method.lower(), path=path)
    verb, name = _verb(request, target), target.name
    if not name and verb in ("list", "watch", "deletecollection"):
        # One object by a selector is one object.
        match = _ONE_NAME.fullmatch(request.query.get("fieldSelector", ""))
        name = match[1] if match else ""
    namespace = target.name if target.plural == "namespaces" and not target.group else target.namespace
    return Attributes(verb, target.group, target.plural, target.subresource, namespace, name)


def _impersonated(request: web.Request) -> User | None:
    name = request.headers.get("Impersonate-User")
    if not name:
        return None
    groups = (*request.headers.getall("Impersonate-Group", []), "system:authenticated")
    prefix = "impersonate-extra-"
    extra = tuple(
        (unquote(key.lower().removeprefix(prefix)), value)
        for key, value in request.headers.items()
        if key.lower().startswith(prefix)
    )
    return User(name, request.headers.get("Impersonate-Uid", ""), groups, extra)


def _verb(request: web.Request, target: Target) -> str:
    match request.method:
        case "GET":
            if target.watch:
                return "watch"
            if target.name:
                return "get"
            watch = request.query.get("watch", "false").lower() not in ("false", "0")
            return "watch" if watch else "list"
        case "POST":
            return "create" if not target.name or target.subresource else ""
        case "PUT":
            return "update" if target.name else ""
        case "PATCH":
            return "patch" if target.name else ""
        case "DELETE":
            return "delete" if target.name else "deletecollection"
        case _:
            return ""


def _is_builtin(group: str) -> bool:
    return any(info.group == group for info in BUILTIN)


def _plain(text: str, status: int = 200) -> web.Response:
    headers = {"Cache-Control": "no-cache, private", "X-Content-Type-Options": "nosniff"}
    return web.Response(text=text, status=status, headers=headers)


def _document(request: web.Request, content: bytes, content_type: str, etag: str | None) -> web.Response:
    headers = {"Content-Type": content_type, "Cache-Control": "no-cache, private", "Vary": "Accept"}
    if etag:
        quoted = etag if etag.startswith('"') else f'"{etag}"'
        headers["Etag"] = quoted
        if request.headers.get("If-None-Match") == quoted:
            return web.Response(status=304, headers=headers)
    return web.Response(body=content, headers=headers)


def _websocket_token(request: web.Request) -> str | None:
    """A bearer token that a browser sent as a websocket subprotocol."""

    prefix = "base64url.bearer.authorization.k8s.io."
    for item in request.headers.get("Sec-WebSocket-Protocol", "").split(","):
        if item.strip().startswith(prefix):
            text = item.strip().removeprefix(prefix)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
            except (binascii.Error, ValueError):
                return None
    return None


def _check_definition(obj: Object, old: Object | None) -> list[Cause]:
    return [Cause(cause.reason, cause.message, cause.field) for cause in crds.validate(obj, old)]
