"""The application as a whole: what it describes, what browsers may, where keys are needed."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute

ORIGIN = "https://page.example"


def operations(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, one) for path, methods in description["paths"].items() for method, one in methods.items()]


def api_routes(site: Any) -> list[APIRoute]:
    found = [
        route for part in site.bare.routes if hasattr(part, "original_router") for route in part.original_router.routes
    ]
    assert len(found) >= 11 and all(isinstance(route, APIRoute) for route in found)
    return found


async def test_every_route_is_described_with_its_errors(site: Any) -> None:
    description = (await site.http.get("/openapi.json")).json()
    described = {(path, method.upper()) for path, method, _ in operations(description)}
    assert described == {
        (route.path.replace(":path", ""), method)
        for route in api_routes(site)
        if route.include_in_schema
        for method in route.methods
    }
    for path, method, operation in operations(description):
        if path.startswith(("/v1", "/tok", "/detok")):
            assert {"200", "400", "401", "404", "413", "415", "429", "500", "503"} <= set(operation["responses"])
            assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorReply")
        assert "422" not in operation["responses"]
        assert method == "get" or operation["requestBody"]["required"]


async def test_every_reference_of_the_description_resolves(site: Any) -> None:
    description = (await site.http.get("/openapi.json")).json()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                _, components, schemas, name = node["$ref"].split("/")
                assert (components, schemas) == ("components", "schemas") and name in description[components][schemas]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(description)


async def test_pages_that_load_scripts_from_elsewhere_are_not_there(site: Any) -> None:
    for path in ("/docs", "/redoc"):
        assert (await site.http.get(path)).status_code == 404


async def test_the_description_says_whether_a_key_is_needed(site: Any, sites: Any) -> None:
    assert "security" not in (await site.http.get("/openapi.json")).json()
    locked = sites(api_key=("secret",))
    response = await locked.http.get("/openapi.json", headers={"authorization": "Bearer secret"})
    assert response.json()["security"] == [{"key": []}]
    assert response.json()["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


async def test_every_path_but_the_probes_needs_a_key(sites: Any) -> None:
    locked = sites(api_key=("secret",))
    for path in [route.path for route in api_routes(locked)] + ["/openapi.json", "/none", "/v1"]:
        for method in ("GET", "POST", "PUT"):
            response = await locked.http.request(method, path.replace("{model:path}", "builtin"))
            if path in ("/health/live", "/health/ready"):
                assert response.status_code != 401
            else:
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("//v1/models", "/v1/models"),
        ("/v1/completion", "/v1/completions"),
    ],
)
async def test_a_path_that_is_almost_one_of_ours_is_told_it(site: Any, path: str, near: str) -> None:
    response = await site.http.request("POST", "http://weft" + path, json={})
    assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"
    assert response.json()["error"]["message"] == f"there is no {path} here; did you mean {near}?"


async def test_metrics_can_be_switched_off(site: Any, sites: Any) -> None:
    assert (await site.http.get("/metrics")).status_code == 200
    assert (await sites(enable_metrics=False).http.get("/metrics")).status_code == 404


@pytest.mark.parametrize("allowed", [False, True])
async def test_browsers_of_other_origins_may_only_where_they_are_allowed(sites: Any, allowed: bool) -> None:
    site = sites(allowed_origins=(ORIGIN,) if allowed else (), api_key=("secret",))
    asks = {"origin": ORIGIN, "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    preflight = await site.http.options("/v1/chat/completions", headers=asks)
    answer = await site.http.get("/v1/models", headers={"origin": ORIGIN, "authorization": "Bearer secret"})
    stranger = await site.http.get("/v1/models", headers={"origin": "https://x", "authorization": "Bearer secret"})
    name = "access-control-allow-origin"
    assert (preflight.status_code == 200) is allowed
    assert answer.headers.get(name) == (ORIGIN if allowed else None)
    assert name not in stranger.headers
