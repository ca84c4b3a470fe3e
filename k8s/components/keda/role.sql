-- The role that KEDA reads the backlog with: the view, and nothing else. As the owner of the schema, after the migration:
--     psql "$LONGSHIFT_DATABASE_URL" --file k8s/components/keda/role.sql
--     psql "$LONGSHIFT_DATABASE_URL" --command '\password keda'
-- May be repeated. A migration that makes the view anew says so in its notes: repeat it then.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'keda') THEN
        CREATE ROLE keda LOGIN;
    END IF;
END $$;
ALTER ROLE keda NOINHERIT CONNECTION LIMIT 10;
ALTER ROLE keda SET statement_timeout = '5s';
ALTER ROLE keda SET default_transaction_read_only = on;
GRANT USAGE ON SCHEMA public TO keda;
GRANT SELECT ON backlog TO keda;
