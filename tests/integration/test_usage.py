"""Usage as callers and admins see it, on the real stack: each key its own; a month priced anew adds up all the same."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from bench.gateway.spec import Spec
from schemas.usage import UsageRows
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until


def made_key(stack: Stack, app: str) -> str:
    """A key of an app of its own."""
    stack.run("apps", "create", app)
    printed = stack.run("keys", "create", "--name", app, "--app", app).stdout
    return next(word for word in printed.split() if word.startswith("hr-"))


def month_begin() -> str:
    return f"{datetime.now(UTC):%Y-%m}-01T00:00:00Z"


async def test_usage_is_the_keys_own_and_a_month_can_be_priced_anew(stack: Stack, api: Api, tmp_path: Path) -> None:
    mine, others = fresh("mine"), fresh("others")
    async with Api(stack, key=made_key(stack, mine)) as one, Api(stack, key=made_key(stack, others)) as other:
        spec = Spec(tokens=7, interval_ms=1, prompt_tokens=3)
        seen = [await one.stream(body(spec)) for _ in range(2)] + [await other.stream(body(spec))]
        await usage_rows(stack, [request.request_id for request in seen])
        answer = await one.get("/v1/usage")
        assert answer.status_code == 200, answer.text
        own = UsageRows.model_validate(answer.json(), strict=True)
        assert (own.bucket, own.has_more) == ("day", False)
        [row] = answer.json()["data"]
        each = (3 * Decimal("1.00") + 7 * Decimal("10.00")) / 1_000_000
        assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (2, 6, 14)
        assert (row["model"], Decimal(row["cost"])) == ("bench", 2 * each)
        refused = await one.get("/admin/usage")
        assert refused.status_code == 403
        wrong = await api.get("/admin/usage?by=tenant;DROP")
        assert wrong.status_code == 400 and "no dimension" in wrong.json()["error"]["message"]

        asked = f"/admin/usage?by=tenant,model&where=tenant:{mine}&where=tenant:{others}&bucket=hour"
        everybody = UsageRows.model_validate((await api.get(asked)).json(), strict=True)
        assert {(found.tenant, found.requests) for found in everybody.data} == {(mine, 2), (others, 1)}
        assert not everybody.has_more
        cut = UsageRows.model_validate((await api.get(f"{asked}&limit=1")).json(), strict=True)
        assert (len(cut.data), cut.has_more) == (1, True), "what lies beyond the limit is told"
        table = await api.get(asked, accept="text/csv")
        assert table.headers["content-type"].startswith("text/csv")
        assert table.text.splitlines()[0].startswith("start,tenant,model,currency,requests,")
        assert f",{mine},bench,USD,2," in table.text
        assert table.headers["x-hr-has-more"] == "false"
        table = await api.get(f"{asked}&limit=1", accept="text/csv")
        assert (table.headers["x-hr-has-more"], len(table.text.splitlines())) == ("true", 2)
        assert cut.last_id is not None
        rest = UsageRows.model_validate((await api.get(f"{asked}&after={cut.last_id}")).json(), strict=True)
        assert ([*cut.data, *rest.data], rest.has_more) == (everybody.data, False), "the next page has the other"
        rest_table = await api.get(f"{asked}&after={table.headers['x-hr-last-id']}", accept="text/csv")
        assert rest_table.headers["x-hr-has-more"] == "false"
        assert {line.split(",")[1] for line in (table.text + rest_table.text).splitlines()} == {"tenant", mine, others}
        wrong = await api.get(f"{asked}&bucket=day&after={cut.last_id}")
        assert wrong.status_code == 400 and "same question" in wrong.json()["error"]["message"]
        by_two = ("usage", "--by", "tenant", "--where", f"tenant={mine}", "--where", f"tenant={others}")
        first = stack.run(*by_two, "--limit", "1", "--format", "csv")
        assert "the same command shows the next ones with --after" in first.stderr
        after = first.stderr.split()[-1]
        second = stack.run(*by_two, "--after", after, "--format", "csv")
        assert not second.stderr and f"{others},USD,1,3," in first.stdout + second.stdout
        assert f"{mine},USD,2,6," in first.stdout + second.stdout
        early = await api.get(f"/admin/usage?to={month_begin()}")
        assert mine not in early.text, "usage after `to` does not belong to it"
        printed = stack.run("usage", "--by", "tenant", "--where", f"tenant={mine}", "--format", "csv").stdout
        assert f"{mine},USD,2,6," in printed

        month = f"{datetime.now(UTC):%Y-%m}"
        prices = tmp_path / "prices.toml"
        prices.write_text('[models."bench"]\nversion = 900\ninput = "2"\noutput = "20"\n')
        before = await settled(stack)
        shown = stack.run("reprice", "--month", month, "--prices", str(prices)).stdout
        assert "nothing was written" in shown and mine in shown
        again = await one.get("/v1/usage")
        assert again.status_code == 200, again.text
        assert again.json()["data"][0]["cost"] == row["cost"]
        assert "wrote" in stack.run("reprice", "--month", month, "--prices", str(prices), "--write").stdout
        assert "nothing changes" in stack.run("reprice", "--month", month, "--prices", str(prices)).stdout

        async def audited() -> dict[str, object] | None:
            told = (await api.get(f"/admin/audit?kind=usage&key={month}")).json()["data"]
            return told[0] if told else None

        trail = await until(audited, "the trail has it")
        assert (trail["action"], trail["detail"]) == (
            "reprice", {"model bench": "v900: 2 in, 2 cached, 20 out, USD"},
        )  # fmt: skip

        async def dearer() -> bool:
            data = (await one.get("/v1/usage")).json()["data"]
            return [Decimal(found["cost"]) for found in data] == [4 * each]

        await until(dearer, "the new prices are shown", 30)
    after = await settled(stack)
    assert after["adds_up"] is True and after["usage_rows"] == before["usage_rows"]
    balance = after["tenants"][mine]  # type: ignore[index]
    assert (balance["accepted"], balance["terminal"], balance["usage_rows"]) == (2, 2, 2)
    assert Decimal(balance["cost"]["USD"]) == 4 * each
    [history] = stack.rows(
        "SELECT groupArray(revision) AS revisions, toString(sumIf(cost, NOT counts)) AS was FROM (SELECT * FROM "  # noqa: S608
        f"usage_history WHERE tenant = '{mine}' ORDER BY usage_id, revision)"
    )
    assert (history["revisions"], Decimal(str(history["was"]))) == ([0, 1, 0, 1], 2 * each)
