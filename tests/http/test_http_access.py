"""Every route has a gate; keys have scopes and models; and what /admin does with keys."""

from __future__ import annotations

from typing import Any

import pytest
from http_access_stand import house
from serving_echo import client, stand
from starlette.routing import Route as AnyRoute

from headrace.http.route import Route

pytestmark = pytest.mark.anyio
OPEN_TO_ALL = {"/health", "/health/live", "/health/ready", "/health/startup", "/docs", "/openapi.json"}


async def test_every_route_needs_a_key() -> None:
    """The list is the application's own: a route that is added without a gate fails here."""
    closed = house(auth="keys")
    routes = [route for route in closed.stand.app.routes if isinstance(route, AnyRoute)]
    assert {route.path for route in routes} > OPEN_TO_ALL
    for number, route in enumerate(routes):
        path = route.path.replace("{model:path}", "echo-1").replace("{id}", "key_1").replace("{name:path}", "acme")
        # An address that tries many bad keys has to wait.
        async with client(closed.stand, f"192.0.2.{number}") as http:
            for method in route.methods or ():
                answer = await http.request(method, path)
                if route.path in OPEN_TO_ALL:
                    assert answer.status_code == 200, path
                else:
                    assert answer.status_code == 401, f"{method} {path} answers without a key"
                    assert answer.headers["www-authenticate"] == "Bearer"
                    bad = await http.request(method, path, headers=bearer("hr-" + "0" * 43))
                    assert bad.status_code == 401, f"{method} {path} answers with a wrong key"


async def test_docs_offer_to_send_a_key_wherever_one_counts() -> None:
    for auth in ("keys", "open"):
        async with client(house(auth=auth).stand) as http:
            paths = (await http.get("/openapi.json")).json()["paths"]
        asks = {path: each["security"] for path, methods in paths.items() for each in methods.values()}
        assert {path for path, keys in asks.items() if not keys} == OPEN_TO_ALL & set(paths)
        may_do_without = {path for path, keys in asks.items() if {} in keys}
        assert all({"bearer": []} in keys for keys in asks.values() if keys)
        assert "/chat/secure" not in may_do_without
        assert ({"/chat", "/v1/chat/completions", "/v1/models", "/metrics"} <= may_do_without) == (auth == "open")
        assert bool(may_do_without) == (auth == "open")


async def test_a_route_without_a_gate_lets_nobody_in() -> None:
    async def endpoint(request: Any) -> Any:
        raise AssertionError

    made = stand()
    made.app.router.add_api_route("/forgotten", endpoint, route_class_override=Route)  # type: ignore[arg-type]
    async with client(made) as http:
        assert (await http.get("/forgotten")).status_code == 500


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def test_what_always_needs_a_key() -> None:
    opened = house()
    async with client(opened.stand) as http:
        assert (await http.post("/chat", json={"prompt": "hi"})).status_code == 200
        assert (await http.post("/chat/secure", json={"prompt": "hi"})).status_code == 401
        for path in ("/admin/keys", "/admin/tenants", "/admin/audit", "/admin/usage", "/admin/cache", "/admin/errors", "/admin/models"):
            assert (await http.get(path)).status_code == 401, path
        assert (await http.post("/admin/reload")).status_code == 401
        assert (await http.get("/admin/ps")).status_code == 200


async def test_scopes_open_routes() -> None:
    closed = house(auth="keys")
    inference = await closed.key("i", {"inference"})
    usage = await closed.key("u", {"usage"})
    admin = await closed.key("a", {"admin"})
    opens = {
        inference: {"/v1/models": 200, "/metrics": 403, "/admin/keys": 403, "/admin/ps": 403},
        usage: {"/v1/models": 403, "/metrics": 200, "/admin/keys": 403, "/admin/ps": 403},
        admin: {"/v1/models": 403, "/metrics": 403, "/admin/keys": 200, "/admin/ps": 200},
    }
    async with client(closed.stand) as http:
        for secret, wanted in opens.items():
            assert {path: (await http.get(path, headers=bearer(secret))).status_code for path in wanted} == wanted
        answer = await http.post("/chat", json={"prompt": "hi"}, headers=bearer(usage))
        assert answer.status_code == 403
        assert "inference" in answer.json()["detail"]


async def test_a_key_uses_its_models_only() -> None:
    closed = house(auth="keys")
    own = await closed.key("own", {"inference"}, models=("house",))
    other = await closed.key("other", {"inference"}, models=("grand",))
    async with client(closed.stand) as http:
        assert [model["id"] for model in (await http.get("/v1/models", headers=bearer(own))).json()["data"]] == ["echo-1", "house"]
        assert (await http.get("/v1/models", headers=bearer(other))).json()["data"] == []
        asked: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", {"model": "echo-1", "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/completions", {"model": "echo-1", "prompt": "x"}),
            ("/chat", {"prompt": "x"}),
            ("/chat/stream", {"prompt": "x"}),
            ("/chat/secure", {"prompt": "x"}),
            ("/tokenize", {"text": "x"}),
            ("/detokenize", {"tokens": [65]}),
        ]
        for path, body in asked:
            assert (await http.post(path, json=body, headers=bearer(own))).status_code == 200, path
            refused = await http.post(path, json=body, headers=bearer(other))
            assert refused.status_code == 403, path
            assert "grand" in refused.text
        batch = (await http.post("/chat/batch", json=[{"prompt": "x"}], headers=bearer(other))).json()
        assert batch["results"][0]["error"]["status"] == 403
        assert (await http.get("/v1/models/house", headers=bearer(other))).status_code == 403
        unknown = await http.post("/chat", json={"prompt": "x", "model": "nope"}, headers=bearer(other))
        assert unknown.status_code == 404
        assert "echo" not in unknown.text


async def test_keys_are_administered_over_http() -> None:
    closed = house(auth="keys")
    root = await closed.key("root", {"inference", "usage", "admin"})
    async with client(closed.stand) as http:
        wish = {"name": "app", "tenant": "acme", "models": ["house"], "rpm": 9, "budget_tokens": 50, "period": "day", "expires": "30d"}
        made = await http.post("/admin/keys", json=wish, headers=bearer(root))
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        key = made.json()
        secret = key.pop("secret")
        assert (key["tenant"], key["models"], key["rpm"], key["budget_period"], key["status"]) == ("acme", ["house"], 9, "day", "active")
        assert secret.startswith(key["prefix"])
        assert (await http.post("/chat", json={"prompt": "x"}, headers=bearer(secret))).status_code == 200

        listed = await http.get("/admin/keys", headers=bearer(root))
        assert {entry["name"] for entry in listed.json()["keys"]} == {"root", "app"}
        one = await http.get(f"/admin/keys/{key['id']}", headers=bearer(root))
        assert one.json() == key
        assert secret not in listed.text + one.text

        rotated = await http.post(f"/admin/keys/{key['id']}/rotate", json={"grace": 60}, headers=bearer(root))
        newer = rotated.json()["secret"]
        assert newer != secret
        assert (await http.post("/chat", json={"prompt": "x"}, headers=bearer(newer))).status_code == 200

        gone = await http.delete(f"/admin/keys/{key['id']}", headers=bearer(root))
        assert gone.json()["status"] == "revoked"
        assert (await http.post(f"/admin/keys/{key['id']}/revoke", headers=bearer(root))).status_code == 200
        assert (await http.post(f"/admin/keys/{key['id']}/rotate", headers=bearer(root))).status_code == 403

        made_tenant = await http.post("/admin/tenants", json={"name": "new", "rpm": 5, "tpm": 6}, headers=bearer(root))
        assert (made_tenant.status_code, made_tenant.json()["rpm"]) == (201, 5)
        changed = await http.patch("/admin/tenants/new", json={"rpm": None, "concurrency": 2}, headers=bearer(root))
        assert (changed.json()["rpm"], changed.json()["tpm"], changed.json()["concurrency"]) == (None, 6, 2)
        assert (await http.patch("/admin/tenants/nope", json={"rpm": 1}, headers=bearer(root))).status_code == 404
        names = [tenant["name"] for tenant in (await http.get("/admin/tenants", headers=bearer(root))).json()["tenants"]]
        assert {"acme", "new"} < set(names)

        entries = (await http.get("/admin/audit", headers=bearer(root))).json()["entries"]
        assert [entry["action"] for entry in entries][1:] == ["key.create", "key.rotate", "key.revoke", "tenant.create", "tenant.change"]
        assert {entry["actor"] for entry in entries[1:]} == {closed.ids["root"]}
        assert secret not in str(entries)
        assert len((await http.get("/admin/audit?limit=2&since=1h", headers=bearer(root))).json()["entries"]) == 2
        assert (await http.post("/admin/tenants", json={"name": "a/b ü", "rpm": 5}, headers=bearer(root))).status_code == 201
        assert (await http.get("/admin/tenants/a%2Fb%20%C3%BC", headers=bearer(root))).json()["name"] == "a/b ü"
        assert (await http.patch("/admin/tenants/a%2Fb%20%C3%BC", json={"rpm": 6}, headers=bearer(root))).json()["rpm"] == 6


@pytest.mark.parametrize(
    "body",
    [
        None, [], {}, {"name": ""}, {"name": "x", "scopes": ["root"]}, {"name": "x", "rpm": 0}, {"name": "x", "rpm": 1.5},
        {"name": "x", "nope": 1}, {"name": "x", "expires": "soon"}, {"name": "x", "expires": 1e300}, {"name": "x", "period": "week"},
        {"name": "a\u0000b"}, {"name": "x", "rpm": 2**70}, {"name": "x", "models": "house"},
    ],
)  # fmt: skip
async def test_bad_wishes_are_refused(body: Any) -> None:
    closed = house()
    root = await closed.key("root", {"inference", "admin"})
    async with client(closed.stand) as http:
        answer = await http.post("/admin/keys", json=body, headers=bearer(root))
    assert answer.status_code in (400, 422)
    assert len(await closed.keys.keys()) == 1


async def test_a_period_is_that_of_a_budget() -> None:
    closed = house()
    root = await closed.key("root", {"inference", "admin"})
    async with client(closed.stand) as http:
        key = await http.post("/admin/keys", json={"name": "x", "period": "day"}, headers=bearer(root))
        tenant = await http.post("/admin/tenants", json={"name": "t", "rpm": 5, "period": "day"}, headers=bearer(root))
        assert (key.status_code, tenant.status_code) == (400, 400)
        assert "`period`" in key.json()["detail"]
        wish = {"name": "t", "budget_tokens": 9, "period": "day"}
        assert (await http.post("/admin/tenants", json=wish, headers=bearer(root))).json()["budget_period"] == "day"
        changed = await http.patch("/admin/tenants/t", json={"period": "total"}, headers=bearer(root))
        assert (changed.json()["budget_tokens"], changed.json()["budget_period"]) == (9, "total")
        assert (await http.patch("/admin/tenants/t", json={"rpm": 3}, headers=bearer(root))).json()["budget_period"] == "total"
        refused = await http.patch("/admin/tenants/t", json={"budget_tokens": None, "period": "day"}, headers=bearer(root))
        assert refused.status_code == 400
        assert (await http.post("/admin/keys", json={"name": "x", "budget_period": "day"}, headers=bearer(root))).status_code == 422


async def test_nobody_makes_a_broader_key_over_http() -> None:
    closed = house(auth="keys")
    acme = await closed.key("acme", {"inference", "admin"}, tenant="acme", models=("house",), rpm=5)
    foreign = await closed.key("foreign", {"inference"}, tenant="other")
    async with client(closed.stand) as http:
        for wish in ({"models": ["grand"]}, {"rpm": 6}, {"scopes": ["usage"]}, {"tenant": "other"}):
            refused = await http.post("/admin/keys", json={"name": "x", **wish}, headers=bearer(acme))
            assert refused.status_code == 403, wish
        assert (await http.delete(f"/admin/keys/{closed.ids['foreign']}", headers=bearer(acme))).status_code == 404
        assert (await http.post("/admin/tenants", json={"name": "acme"}, headers=bearer(acme))).status_code == 403
        made = (await http.post("/admin/keys", json={"name": "x"}, headers=bearer(acme))).json()
        assert (made["tenant"], made["models"], made["rpm"], made["all_tenants"]) == ("acme", ["house"], 5, False)
        assert (await http.get("/v1/models", headers=bearer(foreign))).status_code == 200


async def test_methods_that_a_path_takes() -> None:
    async with client(stand()) as http:
        answer = await http.put("/admin/keys")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD, POST"


async def test_configured_keys_are_no_administrators() -> None:
    made = stand(keys=True)
    async with client(made) as http:
        answer = await http.get("/admin/keys", headers=bearer("sesame-open-very-secret"))
    assert answer.status_code == 403
