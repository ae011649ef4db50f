"""The peers' image store: boto3, one client for a process; and the image that they all draw."""

import base64
import os

import boto3
from botocore.config import Config

BUCKET = f"peers-{os.environ['PEER_QUEUE']}"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
"""One pixel."""

client = boto3.client(
    "s3",
    endpoint_url=os.environ["ZIMAGE_S3_ENDPOINT_URL"],
    aws_access_key_id=os.environ["ZIMAGE_S3_ACCESS_KEY_ID"],
    aws_secret_access_key=os.environ["ZIMAGE_S3_SECRET_ACCESS_KEY"],
    region_name="us-east-1",
    config=Config(s3={"addressing_style": "path"}),
)


def url(key: str) -> str:
    return str(client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key}))
