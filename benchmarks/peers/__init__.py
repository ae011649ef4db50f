"""The stack that tutorials build: FastAPI, the ORM of SQLAlchemy 2, PostgreSQL, and RQ or Celery.

It does the same work as the service in its shortest form: a key is looked up, credits are checked
and reserved, a task is inserted and queued; a worker stores an image and charges for it. It has no
limits of rates, no idempotency, no fair order, no callbacks and no repairs. It is written to be
fast where a tutorial would be: connections are pooled, lookups are indexed, the loop is uvloop,
queries are asynchronous, and its workers do not fork for each job.
"""
