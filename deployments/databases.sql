-- Run once by the postgres image, in the database `prefect` that it has just made.
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE DATABASE mlflow;
