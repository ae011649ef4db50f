-- Every statement by which release 0.3.0 changes the database, as it sent them: an account, a key and
-- a grant; five tasks, of which one completes, one fails, one is lost and cancelled, one is being
-- drawn and one waits; their callbacks told, given up, told again; what is forgotten. An empty line
-- is a commit. When a release is made, the next one's statements take its place.

INSERT INTO accounts (id, name, user_group, balance, reserved, unfinished, unfinished_max,
    suspended, virtual_finish, callback_secret, callback_secret_before,
    callback_secret_before_until) VALUES ('acct_0000000000000001', 'a customer', 'default', 0, 0, 0,
    NULL, false, 0.0, 'whsec_AAAA', NULL, NULL);
SELECT 1 FROM accounts WHERE accounts.id = 'acct_0000000000000001' FOR NO KEY UPDATE;
UPDATE accounts SET balance=100.000000 WHERE accounts.id = 'acct_0000000000000001';
INSERT INTO ledger_entries (account_id, kind, amount, balance_after, actor, note, task_id,
    idempotency_key) VALUES ('acct_0000000000000001', 'grant', 100, 100.000000, 'test', 'n', NULL,
    'invoice-1');
INSERT INTO api_keys (id, account_id, name, secret_sha256, prefix, models, admin,
    requests_per_minute, used_credits, expires_at, revoked_at, last_used_at) VALUES
    ('key_0000000000000001', 'acct_0000000000000001', '',
    '\xc8f5e174af60ef53315109e881ae04ab4043a899a5effce9c89007c397faeed3', 'zk_0123', NULL, false,
    NULL, 0, NULL, NULL, NULL);

SELECT 1 FROM accounts WHERE accounts.id IN ('acct_0000000000000001') ORDER BY accounts.id FOR
    NO KEY UPDATE OF accounts;
UPDATE accounts SET reserved=15.000000, unfinished=1, virtual_finish=0.00390625 WHERE
    accounts.id = 'acct_0000000000000001';
INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
    height, seed, seed_given, steps, image_format, callback_url, prompt_extend, strict_moderation,
    allow_downscale, price, user_group, fair_tag, deadline_at, status, progress, attempt, losses,
    created_at) VALUES ('task-unified-1757165031-00000000', 'acct_0000000000000001',
    'key_0000000000000001', 'evolink', 'req_1', 'z-image-turbo', 'a cat', 64, 64, 735737943, false,
    8, 'png', 'https://example.com/hook', true, false, false, 15, 'default', 0.0, '2030-01-01',
    'pending', 0, 0, 0, clock_timestamp());
INSERT INTO remembered_requests (account_id, idempotency_key, fingerprint, resend, task_ids)
    VALUES ('acct_0000000000000001', 'order-0',
    '\x7878787878787878787878787878787878787878787878787878787878787878', 0,
    '{task-unified-1757165031-00000000}') ON CONFLICT (account_id, idempotency_key) DO UPDATE SET
    fingerprint = excluded.fingerprint, resend = excluded.resend, task_ids = excluded.task_ids,
    created_at = clock_timestamp();

SELECT 1 FROM accounts WHERE accounts.id IN ('acct_0000000000000001') ORDER BY accounts.id FOR
    NO KEY UPDATE OF accounts;
UPDATE accounts SET reserved=30.000000, unfinished=2, virtual_finish=0.0078125 WHERE accounts.id
    = 'acct_0000000000000001';
INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
    height, seed, seed_given, steps, image_format, callback_url, prompt_extend, strict_moderation,
    allow_downscale, price, user_group, fair_tag, deadline_at, status, progress, attempt, losses,
    created_at) VALUES ('task-unified-1757165031-00000001', 'acct_0000000000000001',
    'key_0000000000000001', 'evolink', 'req_1', 'z-image-turbo', 'a cat', 64, 64, 728974925, false,
    8, 'png', 'https://example.com/hook', true, false, false, 15, 'default', 0.00390625,
    '2030-01-01', 'pending', 0, 0, 0, clock_timestamp());
INSERT INTO remembered_requests (account_id, idempotency_key, fingerprint, resend, task_ids)
    VALUES ('acct_0000000000000001', 'order-1',
    '\x7878787878787878787878787878787878787878787878787878787878787878', 0,
    '{task-unified-1757165031-00000001}') ON CONFLICT (account_id, idempotency_key) DO UPDATE SET
    fingerprint = excluded.fingerprint, resend = excluded.resend, task_ids = excluded.task_ids,
    created_at = clock_timestamp();

SELECT 1 FROM accounts WHERE accounts.id IN ('acct_0000000000000001') ORDER BY accounts.id FOR
    NO KEY UPDATE OF accounts;
UPDATE accounts SET reserved=45.000000, unfinished=3, virtual_finish=0.01171875 WHERE
    accounts.id = 'acct_0000000000000001';
INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
    height, seed, seed_given, steps, image_format, callback_url, prompt_extend, strict_moderation,
    allow_downscale, price, user_group, fair_tag, deadline_at, status, progress, attempt, losses,
    created_at) VALUES ('task-unified-1757165031-00000002', 'acct_0000000000000001',
    'key_0000000000000001', 'evolink', 'req_1', 'z-image-turbo', 'a cat', 64, 64, 1247099274, false,
    8, 'png', 'https://example.com/hook', true, false, false, 15, 'default', 0.0078125,
    '2030-01-01', 'pending', 0, 0, 0, clock_timestamp());
INSERT INTO remembered_requests (account_id, idempotency_key, fingerprint, resend, task_ids)
    VALUES ('acct_0000000000000001', 'order-2',
    '\x7878787878787878787878787878787878787878787878787878787878787878', 0,
    '{task-unified-1757165031-00000002}') ON CONFLICT (account_id, idempotency_key) DO UPDATE SET
    fingerprint = excluded.fingerprint, resend = excluded.resend, task_ids = excluded.task_ids,
    created_at = clock_timestamp();

SELECT 1 FROM accounts WHERE accounts.id IN ('acct_0000000000000001') ORDER BY accounts.id FOR
    NO KEY UPDATE OF accounts;
UPDATE accounts SET reserved=60.000000, unfinished=4, virtual_finish=0.015625 WHERE accounts.id
    = 'acct_0000000000000001';
INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
    height, seed, seed_given, steps, image_format, callback_url, prompt_extend, strict_moderation,
    allow_downscale, price, user_group, fair_tag, deadline_at, status, progress, attempt, losses,
    created_at) VALUES ('task-unified-1757165031-00000003', 'acct_0000000000000001',
    'key_0000000000000001', 'evolink', 'req_1', 'z-image-turbo', 'a cat', 64, 64, 372693604, false,
    8, 'png', 'https://example.com/hook', true, false, false, 15, 'default', 0.01171875,
    '2030-01-01', 'pending', 0, 0, 0, clock_timestamp());
INSERT INTO remembered_requests (account_id, idempotency_key, fingerprint, resend, task_ids)
    VALUES ('acct_0000000000000001', 'order-3',
    '\x7878787878787878787878787878787878787878787878787878787878787878', 0,
    '{task-unified-1757165031-00000003}') ON CONFLICT (account_id, idempotency_key) DO UPDATE SET
    fingerprint = excluded.fingerprint, resend = excluded.resend, task_ids = excluded.task_ids,
    created_at = clock_timestamp();

SELECT 1 FROM accounts WHERE accounts.id IN ('acct_0000000000000001') ORDER BY accounts.id FOR
    NO KEY UPDATE OF accounts;
UPDATE accounts SET reserved=75.000000, unfinished=5, virtual_finish=0.01953125 WHERE
    accounts.id = 'acct_0000000000000001';
INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
    height, seed, seed_given, steps, image_format, callback_url, prompt_extend, strict_moderation,
    allow_downscale, price, user_group, fair_tag, deadline_at, status, progress, attempt, losses,
    created_at) VALUES ('task-unified-1757165031-00000004', 'acct_0000000000000001',
    'key_0000000000000001', 'evolink', 'req_1', 'z-image-turbo', 'a cat', 64, 64, 1624903205, false,
    8, 'png', 'https://example.com/hook', true, false, false, 15, 'default', 0.015625, '2030-01-01',
    'pending', 0, 0, 0, clock_timestamp());
INSERT INTO remembered_requests (account_id, idempotency_key, fingerprint, resend, task_ids)
    VALUES ('acct_0000000000000001', 'order-4',
    '\x7878787878787878787878787878787878787878787878787878787878787878', 0,
    '{task-unified-1757165031-00000004}') ON CONFLICT (account_id, idempotency_key) DO UPDATE SET
    fingerprint = excluded.fingerprint, resend = excluded.resend, task_ids = excluded.task_ids,
    created_at = clock_timestamp();

WITH fairest AS (SELECT tasks.id AS id FROM tasks WHERE tasks.status = 'pending' AND
    (tasks.deadline_at IS NULL OR tasks.deadline_at > clock_timestamp()) ORDER BY tasks.fair_tag,
    tasks.id LIMIT 1 FOR UPDATE SKIP LOCKED) UPDATE tasks SET status='processing',
    attempt=(tasks.attempt + 1), worker='w', lease_until=(clock_timestamp() + interval '0:00:10'),
    started_at=clock_timestamp() FROM fairest WHERE tasks.id = fairest.id AND tasks.status IN
    ('pending');
UPDATE fair_clock SET virtual_now=0.0 WHERE fair_clock.virtual_now < 0.0;

WITH fairest AS (SELECT tasks.id AS id FROM tasks WHERE tasks.status = 'pending' AND
    (tasks.deadline_at IS NULL OR tasks.deadline_at > clock_timestamp()) ORDER BY tasks.fair_tag,
    tasks.id LIMIT 1 FOR UPDATE SKIP LOCKED) UPDATE tasks SET status='processing',
    attempt=(tasks.attempt + 1), worker='w', lease_until=(clock_timestamp() + interval '0:00:10'),
    started_at=clock_timestamp() FROM fairest WHERE tasks.id = fairest.id AND tasks.status IN
    ('pending');
UPDATE fair_clock SET virtual_now=0.00390625 WHERE fair_clock.virtual_now < 0.00390625;

WITH fairest AS (SELECT tasks.id AS id FROM tasks WHERE tasks.status = 'pending' AND
    (tasks.deadline_at IS NULL OR tasks.deadline_at > clock_timestamp()) ORDER BY tasks.fair_tag,
    tasks.id LIMIT 1 FOR UPDATE SKIP LOCKED) UPDATE tasks SET status='processing',
    attempt=(tasks.attempt + 1), worker='w', lease_until=(clock_timestamp() + interval '0:00:10'),
    started_at=clock_timestamp() FROM fairest WHERE tasks.id = fairest.id AND tasks.status IN
    ('pending');
UPDATE fair_clock SET virtual_now=0.0078125 WHERE fair_clock.virtual_now < 0.0078125;

UPDATE tasks SET lease_until = clock_timestamp() + make_interval(secs => 10.0), progress =
    greatest(tasks.progress, held.progress) FROM
    unnest(CAST('{task-unified-1757165031-00000000,task-unified-1757165031-00000001,task-unified-1757165031-00000002}'
    AS text[]), CAST('{1,1,1}' AS int[]), CAST('{10,10,10}' AS int[])) AS held(id, attempt,
    progress) WHERE tasks.id = held.id AND tasks.attempt = held.attempt AND tasks.status =
    'processing';

UPDATE tasks SET rewritten_prompt='t', reasoning='r', rewrite_input_tokens=1,
    rewrite_output_tokens=2, rewrite_reasoning_tokens=1 WHERE tasks.id =
    'task-unified-1757165031-00000000' AND tasks.attempt = 1 AND tasks.status = 'processing';

UPDATE tasks SET status='completed', progress=100, lease_until=NULL, prompt_tokens=3,
    prompt_tokens_read=3, image_key='images/x.png', image_url='https://x',
    image_expires_at='2030-01-01', image_sha256='ab', image_size_bytes=1, image_width=64,
    image_height=64, finished_at=clock_timestamp() WHERE tasks.status IN ('processing') AND tasks.id
    = 'task-unified-1757165031-00000000' AND tasks.attempt = 1 AND tasks.status = 'processing';
UPDATE accounts SET balance=(accounts.balance - 15.000000), reserved=(accounts.reserved -
    15.000000), unfinished=(accounts.unfinished - 1) WHERE accounts.id = 'acct_0000000000000001';
UPDATE api_keys SET used_credits=(api_keys.used_credits + 15.000000) WHERE api_keys.id =
    'key_0000000000000001';
INSERT INTO ledger_entries (account_id, kind, amount, balance_after, actor, note, task_id,
    idempotency_key) VALUES ('acct_0000000000000001', 'charge', -15.000000, 85.000000, 'worker',
    NULL, 'task-unified-1757165031-00000000', NULL);
INSERT INTO deliveries (id, task_id, account_id, url, state, attempts, claim, last_status,
    last_error, delivered_at) VALUES ('msg_00000000000000000000000000000000',
    'task-unified-1757165031-00000000', 'acct_0000000000000001', 'https://example.com/hook',
    'waiting', 0, 0, NULL, NULL, NULL);

UPDATE tasks SET status='failed', lease_until=NULL, error_code='GenerationFailed',
    error_message='The image could not be generated. You were not charged; please try again.',
    finished_at=clock_timestamp() WHERE tasks.status IN ('processing') AND tasks.id =
    'task-unified-1757165031-00000001' AND tasks.attempt = 1 AND tasks.status = 'processing';
UPDATE accounts SET reserved=(accounts.reserved - 15.000000), unfinished=(accounts.unfinished -
    1) WHERE accounts.id = 'acct_0000000000000001';
INSERT INTO deliveries (id, task_id, account_id, url, state, attempts, claim, last_status,
    last_error, delivered_at) VALUES ('msg_00000000000000000000000000000001',
    'task-unified-1757165031-00000001', 'acct_0000000000000001', 'https://example.com/hook',
    'waiting', 0, 0, NULL, NULL, NULL);

UPDATE tasks SET status='pending', progress=0, losses=(tasks.losses + 1), lease_until=NULL WHERE
    tasks.status IN ('processing') AND tasks.id = 'task-unified-1757165031-00000002' AND
    tasks.attempt = 1 AND tasks.status = 'processing' AND tasks.losses + 1 < 3;

UPDATE tasks SET status='cancelled', lease_until=NULL, finished_at=clock_timestamp() WHERE
    tasks.status IN ('pending', 'processing') AND tasks.id = 'task-unified-1757165031-00000002' AND
    tasks.account_id = 'acct_0000000000000001';
UPDATE accounts SET reserved=(accounts.reserved - 15.000000), unfinished=(accounts.unfinished -
    1) WHERE accounts.id = 'acct_0000000000000001';
INSERT INTO deliveries (id, task_id, account_id, url, state, attempts, claim, last_status,
    last_error, delivered_at) VALUES ('msg_00000000000000000000000000000002',
    'task-unified-1757165031-00000002', 'acct_0000000000000001', 'https://example.com/hook',
    'waiting', 0, 0, NULL, NULL, NULL);

WITH due AS (SELECT deliveries.id AS id FROM deliveries WHERE deliveries.state = 'waiting' AND
    deliveries.next_attempt_at <= clock_timestamp() AND (deliveries.account_id NOT IN (NULL) OR (1 =
    1)) ORDER BY deliveries.next_attempt_at LIMIT 10 FOR UPDATE SKIP LOCKED) UPDATE deliveries SET
    claim=(deliveries.claim + 1), next_attempt_at=(clock_timestamp() + interval '0:00:30') FROM due
    WHERE deliveries.id = due.id;

UPDATE deliveries SET state='delivered', attempts=(deliveries.attempts + 1), last_status=200,
    last_error=NULL, delivered_at=clock_timestamp() WHERE deliveries.id =
    'msg_00000000000000000000000000000000' AND deliveries.claim = 1 AND deliveries.state = 'waiting';
INSERT INTO delivery_attempts (delivery_id, status, error) VALUES
    ('msg_00000000000000000000000000000000', 200, NULL);

UPDATE deliveries SET state='gave_up', attempts=(deliveries.attempts + 1), last_status=NULL,
    last_error='x' WHERE deliveries.id = 'msg_00000000000000000000000000000001' AND deliveries.claim
    = 1 AND deliveries.state = 'waiting';
INSERT INTO delivery_attempts (delivery_id, status, error) VALUES
    ('msg_00000000000000000000000000000001', NULL, 'x');

SELECT 1 FROM deliveries WHERE deliveries.account_id = 'acct_0000000000000001' AND
    deliveries.task_id = 'task-unified-1757165031-00000000' ORDER BY deliveries.created_at,
    deliveries.id LIMIT 10 FOR UPDATE;
UPDATE deliveries SET state='waiting', attempts=0, next_attempt_at=clock_timestamp(),
    delivered_at=NULL WHERE deliveries.id = 'msg_00000000000000000000000000000000';

WITH due AS (SELECT deliveries.id AS id FROM deliveries WHERE deliveries.state = 'waiting' AND
    deliveries.next_attempt_at <= clock_timestamp() AND (deliveries.account_id NOT IN (NULL) OR (1 =
    1)) ORDER BY deliveries.next_attempt_at LIMIT 10 FOR UPDATE SKIP LOCKED) UPDATE deliveries SET
    claim=(deliveries.claim + 1), next_attempt_at=(clock_timestamp() + interval '0:00:30') FROM due
    WHERE deliveries.id = due.id;

UPDATE deliveries SET state='delivered', attempts=(deliveries.attempts + 1), last_status=200,
    last_error=NULL, delivered_at=clock_timestamp() WHERE deliveries.id =
    'msg_00000000000000000000000000000000' AND deliveries.claim = 2 AND deliveries.state = 'waiting';
INSERT INTO delivery_attempts (delivery_id, status, error) VALUES
    ('msg_00000000000000000000000000000000', 200, NULL);

UPDATE accounts SET callback_secret='whsec_AAAA',
    callback_secret_before=accounts.callback_secret, callback_secret_before_until='2030-01-01' WHERE
    accounts.id = 'acct_0000000000000001';

DELETE FROM remembered_requests WHERE remembered_requests.id IN (SELECT remembered_requests.id
    FROM remembered_requests WHERE remembered_requests.created_at < clock_timestamp() + interval '-1
    day' LIMIT 10 FOR UPDATE SKIP LOCKED);

WITH fairest AS (SELECT tasks.id AS id FROM tasks WHERE tasks.status = 'pending' AND
    (tasks.deadline_at IS NULL OR tasks.deadline_at > clock_timestamp()) ORDER BY tasks.fair_tag,
    tasks.id LIMIT 1 FOR UPDATE SKIP LOCKED) UPDATE tasks SET status='processing',
    attempt=(tasks.attempt + 1), worker='w', lease_until=(clock_timestamp() + interval '0:00:10'),
    started_at=clock_timestamp() FROM fairest WHERE tasks.id = fairest.id AND tasks.status IN
    ('pending');
UPDATE fair_clock SET virtual_now=0.01171875 WHERE fair_clock.virtual_now < 0.01171875;
