"""The tables of the gateway's database, by version. `PRAGMA user_version` stores the version of a file."""

from __future__ import annotations

import sqlite3

from llama.errors import BadSettings

MIGRATIONS = (
    """
    CREATE TABLE keys (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        hash TEXT,
        webhook_secret TEXT NOT NULL,
        requests_per_minute INTEGER,
        at_once INTEGER,
        created_at REAL NOT NULL,
        revoked_at REAL
    );
    CREATE UNIQUE INDEX keys_by_name ON keys (name) WHERE revoked_at IS NULL;

    CREATE TABLE predictions (
        sequence INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        stream_token TEXT NOT NULL UNIQUE,
        key_id INTEGER NOT NULL REFERENCES keys (id),
        created_at REAL NOT NULL,
        started_at REAL,
        progress_at REAL,
        completed_at REAL,
        status TEXT NOT NULL,
        request TEXT NOT NULL,
        inputs TEXT,
        output TEXT,
        logs TEXT,
        error TEXT,
        metrics TEXT NOT NULL DEFAULT '{}',
        webhook_due INTEGER NOT NULL
    );
    CREATE INDEX predictions_by_key ON predictions (key_id, sequence);
    CREATE INDEX predictions_running ON predictions (sequence) WHERE completed_at IS NULL;
    CREATE INDEX predictions_by_end ON predictions (completed_at);
    CREATE INDEX predictions_with_data ON predictions (completed_at) WHERE inputs IS NOT NULL;
    CREATE INDEX predictions_with_webhook ON predictions (sequence) WHERE webhook_due = 1;

    CREATE TABLE usage (
        key_id INTEGER NOT NULL REFERENCES keys (id),
        day TEXT NOT NULL,
        model TEXT NOT NULL,
        predictions INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        seconds REAL NOT NULL,
        PRIMARY KEY (key_id, day, model)
    );

    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    """
    ALTER TABLE keys ADD COLUMN monthly_tokens INTEGER;
    ALTER TABLE keys ADD COLUMN monthly_dollars TEXT;
    """,
)


def migrate(connection: sqlite3.Connection) -> None:
    """Upgrade a database to the newest version, each step in a transaction of its own.

    Raises BadSettings if the file was written by a newer gateway.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise BadSettings(
            f"the gateway's database has version {version}, but this gateway knows versions up to "
            f"{len(MIGRATIONS)}; upgrade the gateway, or set LLAMA_GATEWAY_DATABASE to another file"
        )
    # The caller's lock keeps other processes from doing the same.
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
