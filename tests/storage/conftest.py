import itertools

import boto3
import pytest
from fault_proxy import FaultProxy
from services import AWS_ENVIRONMENT, moto_server

VARIABLES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL", "WMTP_CACHE_LIMIT")

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server():
    """A real S3 server, and a proxy in front of it."""
    with moto_server() as url, FaultProxy(url) as proxy:
        yield url, proxy


class Bucket:
    """A new bucket, written to directly; the environment leads to it through the proxy."""

    def __init__(self, server, name):
        url, self.proxy = server
        self.client = boto3.client("s3", endpoint_url=url)
        self.name, self.uri = name, f"s3://{name}"
        self.client.create_bucket(Bucket=name)

    def put(self, key, body, **metadata):
        self.client.put_object(Bucket=self.name, Key=key, Body=body, Metadata=metadata)

    def get(self, key):
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def keys(self, prefix=""):
        return [o["Key"] for o in self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])]

    def gets_of(self, key):
        """How often the proxy was asked for an object's content."""
        return [path for method, path in self.proxy.log if method == "GET" and path.startswith(f"/{self.name}/{key}")]


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in AWS_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server[1].url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setattr("wmtp.storage.s3._FIRST_WAIT", 0.02)
    made = Bucket(server, f"bucket-{next(_numbers)}")
    made.proxy.reset()
    return made
