-- Run once, by Postgres itself, when its volume is empty.
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
CREATE DATABASE prefect;
