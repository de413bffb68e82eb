"""What was spent, in sums: a row per day, key, user, model and kind of call, however many requests
there were. Days are those of UTC. Knows no prices and no limits' form (gateway/limits.py).

What a deleted user has spent stays in the sums as nobody's, and so do old rows (`forget_spenders`).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from hydra_llm.store import schema
from hydra_llm.store.database import in_parts, mark_deletion
from hydra_llm.store.responses import Responses
from hydra_llm.store.values import Limited, Spend, Spender, SpendGroup, Total

COLUMNS = {"day": "day", "key": "key", "user": "name", "model": "model", "kind": "kind"}
"""What spend can be shown by → the column."""
RATE, MICRO = "rate", 1_000_000  # the kind of totals that are buckets, in microseconds
AMOUNTS = tuple(field.name for field in fields(Spend))
Row = dict[str, Any]


class Spending(Responses):
    """The part of the store that keeps what was spent."""

    def add_spend(
        self, spent: Mapping[Spender, Spend], totals: Mapping[Total, Spend] | None = None
    ) -> None:
        """Add what was spent, and to the `totals` that limits compare. What a user has spent who
        was deleted since (another `user_key`) is nobody's.
        """
        with self.writing() as connection:
            gone = _gone(connection, spent)
            rows = defaultdict[tuple[str, ...], Spend](Spend)
            for spender, amount in spent.items():
                name = "" if (spender.user, spender.user_key) in gone else spender.user
                rows[spender.day, spender.key, name, spender.model, spender.kind] += amount
            _add(connection, rows)
            deleted = {user for user, _ in gone}
            for total, amount in sorted((totals or {}).items()):
                if total.kind != "user" or total.name not in deleted:
                    _add_to_total(connection, total, amount)

    def spend(
        self,
        *by: str,
        since: str = "",
        until: str = "9999",
        users: Sequence[str] | None = None,
        key: str | None = None,
        limit: int | None = None,
    ) -> list[SpendGroup]:
        """What was spent from day `since` to day `until` (ISO, both included), in groups `by` any
        of COLUMNS, the dearest first, or in their order where `day` is the first; of some `users`
        ('' is nobody) or a key, or of all. Without `by`: one group, the total.
        """
        table = schema.spend.c
        groups = [table[COLUMNS[name]] for name in by]
        sums = [sa.func.coalesce(sa.func.sum(table[name]), 0).label(name) for name in AMOUNTS]
        query = sa.select(*groups, *sums).where(table.day >= since, table.day <= until)
        if users is not None:
            query = query.where(table.name.in_(users))
        if key is not None:
            query = query.where(table.key == key)
        dearest = [sa.desc("cost"), sa.desc("prompt_tokens"), *groups]
        order = groups if by[:1] == ("day",) else dearest
        query = query.group_by(*groups).order_by(*order).limit(limit) if by else query
        split = len(groups)
        return [
            SpendGroup(dict(zip(by, row[:split], strict=True)), Spend(*map(int, row[split:])))
            for row in self.rows(query)
        ]

    def spent(self, totals: Collection[Total]) -> dict[Total, Spend]:
        """How much of these totals is spent: tokens (as those of prompts) and cost."""
        table = schema.totals.c
        if not totals:
            return {}
        any_of = sa.or_(
            *(
                sa.and_(table.kind == t.kind, table.name == t.name, table.period == t.period)
                for t in totals
            )
        )
        columns = (table.kind, table.name, table.period, table.tokens, table.cost)
        return {
            Total(*row[:3]): Spend(prompt_tokens=row.tokens, cost=row.cost)
            for row in self.rows(sa.select(*columns).where(any_of))
        }

    def take_requests(self, key: str, per_minute: int, count: int, now: float) -> tuple[int, float]:
        """Take up to `count` requests of a key's bucket, which holds `per_minute` and fills in a
        minute: how many, and in how many seconds there will be one more. All servers share it.
        """
        place, table = {"kind": RATE, "name": key, "period": ""}, schema.totals
        own = sa.and_(*(table.c[name] == value for name, value in place.items()))
        moment, each = round(now * MICRO), 60 * MICRO / per_minute
        with self.writing() as connection:
            _upsert(connection, table, place, {"tokens": 0, "cost": 0})  # which locks the row
            # A row holds the moment at which its bucket will be full.
            kept = connection.execute(sa.select(table.c.tokens).where(own)).scalar_one()
            full = max(kept, moment)
            room = moment + 60 * MICRO - full
            taken = min(count, max(0, int(room / each + 1e-6)))
            if taken:
                later = sa.update(table).where(own).values(tokens=full + round(taken * each))
                connection.execute(later)
        return taken, max(0.0, (1 + taken) * each - room) / MICRO

    def forget_spenders(self, before: str) -> int:
        """Make what was spent before a day nobody's, of no key; how many rows that were."""
        old = (schema.spend.c.day < before) & (
            (schema.spend.c.name != "") | (schema.spend.c.key != "")
        )
        with self.writing() as connection:
            if rows := _make_nobodys(connection, old, lambda row: True):
                mark_deletion(connection)
            return rows

    def prune_totals(self, day: str, month: str, minute: str) -> None:
        """Delete the totals of days, months and minutes before these."""
        period = schema.totals.c.period
        ended = [
            period.like("____-__-__") & (period < day),
            period.like("____-__") & (period < month),
        ]
        ended.append(period.like("m%") & (period < minute))
        with self.writing() as connection:
            connection.execute(sa.delete(schema.totals).where(sa.or_(*ended)))

    # ---- limits

    def limits(self) -> list[Limited]:
        """Every limit of a single key or user, as its text."""
        table = schema.limits.c
        query = sa.select(table.kind, table.name, table.value).order_by(table.kind, table.name)
        return [Limited(*row) for row in self.rows(query)]

    def set_limit(self, kind: str, name: str, value: str | None) -> None:
        """Set the limit of a `key` or `user`; None: as the settings say."""
        table = schema.limits
        with self.writing() as connection:
            own = (table.c.kind == kind) & (table.c.name == name)
            connection.execute(sa.delete(table).where(own))
            if value is not None:
                connection.execute(sa.insert(table).values(kind=kind, name=name, value=value))


def forget_spender(connection: Connection, name: str, keys: Collection[str]) -> int:
    """Make what a user has spent nobody's, and without the keys that are deleted with the user; the
    limits go. How many rows named the user.
    """
    spend = schema.spend.c
    own = _make_nobodys(connection, spend.name == name, lambda row: row["key"] in keys)
    for table in (schema.totals, schema.limits):
        rows = sa.delete(table).where(table.c.kind == "user", table.c.name == name)
        connection.execute(rows)
    for part in in_parts(keys):
        _make_nobodys(connection, spend.key.in_(part), lambda row: True)
        for table in (schema.totals, schema.limits):
            rows = sa.delete(table).where(table.c.kind.in_(("key", RATE)), table.c.name.in_(part))
            connection.execute(rows)
    return own


def _gone(connection: Connection, spenders: Iterable[Spender]) -> set[tuple[str, int | None]]:
    """Users, by name and key, who were deleted; those who are there stay until the end."""
    named: set[tuple[str, int | None]] = {
        (s.user, s.user_key) for s in spenders if s.user_key is not None
    }
    users, there = schema.users.c, set[tuple[str, int | None]]()
    for part in in_parts(sorted({user for user, _ in named})):
        rows = sa.select(users.name, users.key).where(users.name.in_(part)).order_by(users.key)
        there |= {(name, key) for name, key in connection.execute(rows.with_for_update(read=True))}
    return named - there


def _add(connection: Connection, rows: Mapping[tuple[str, ...], Spend]) -> None:
    """Add to rows, in an order that all servers keep: else two could wait for each other."""
    names = list(COLUMNS.values())
    for place, amount in sorted(rows.items(), key=lambda item: item[0]):
        amounts = dict(zip(AMOUNTS, astuple(amount), strict=True))
        _upsert(connection, schema.spend, dict(zip(names, place, strict=True)), amounts)


def _add_to_total(connection: Connection, total: Total, amount: Spend) -> None:
    place = {"kind": total.kind, "name": total.name, "period": total.period}
    amounts = {"tokens": amount.tokens, "cost": amount.cost}
    _upsert(connection, schema.totals, place, amounts)


def _upsert(
    connection: Connection, table: sa.Table, place: Mapping[str, str], amounts: Mapping[str, int]
) -> None:
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    row = dialect.insert(table).values({**place, **amounts})
    more = {name: table.c[name] + row.excluded[name] for name in amounts}
    connection.execute(row.on_conflict_do_update(index_elements=list(place), set_=more))


def _make_nobodys(connection: Connection, where: Any, without_key: Any) -> int:
    """Rows without their user, and without their key where `without_key(row)`."""
    taken, rows = schema.spend, defaultdict[tuple[str, ...], Spend](Spend)
    delete = sa.delete(taken).where(where)
    if connection.dialect.name == "sqlite":  # nobody else writes
        found: Sequence[Any] = connection.execute(sa.select(taken).where(where)).mappings().all()
        connection.execute(delete)
    else:  # what others add meanwhile is no row of these
        found = connection.execute(delete.returning(*taken.c)).mappings().all()
    for row in found:
        key = "" if without_key(row) else row["key"]
        amount = Spend(*(row[name] for name in AMOUNTS))
        rows[row["day"], key, "", row["model"], row["kind"]] += amount
    _add(connection, rows)
    return len(found)
