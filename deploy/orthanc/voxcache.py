"""Tells voxcache of stable series and studies, changed metadata and deletions.

For Orthanc's Python plugin: ``"PythonScript": "/etc/orthanc/voxcache.py"``. Set in Orthanc's environment:

    VOXCACHE_ARRIVALS   where to post; http://127.0.0.1:8600/v1/arrivals/orthanc unless it is set
    VOXCACHE_TOKEN      the bearer token, if webhooks.secrets.orthanc asks for one
    VOXCACHE_HMAC       or the key of its signature

What cannot be posted is tried again, later each time, until Orthanc stops. What waits then is lost: have the changes
polled as well (arrivals.md, "When nothing is sent").
"""

import collections
import hashlib
import hmac
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request

import orthanc

URL = os.environ.get("VOXCACHE_ARRIVALS") or "http://127.0.0.1:8600/v1/arrivals/orthanc"
TOKEN = os.environ.get("VOXCACHE_TOKEN", "")
KEY = os.environ.get("VOXCACHE_HMAC", "")
LONGEST_PAUSE_S = 60.0

CHANGES = {
    orthanc.ChangeType.STABLE_SERIES: "StableSeries",
    orthanc.ChangeType.STABLE_STUDY: "StableStudy",
    orthanc.ChangeType.UPDATED_METADATA: "UpdatedMetadata",
    orthanc.ChangeType.DELETED: "Deleted",
}
LEVELS = {orthanc.ResourceType.SERIES: "series", orthanc.ResourceType.STUDY: "studies"}

# Of what is deleted Orthanc tells the id alone, so UIDs are remembered by it.
known = collections.OrderedDict()
KNOWN = 100_000

waiting = queue.Queue()
stopping = threading.Event()


def on_change(change, level, resource):
    """Called by Orthanc, which waits meanwhile: what takes time is left to the thread below."""
    if change == orthanc.ChangeType.ORTHANC_STOPPED:
        stopping.set()
        waiting.put(None)
    elif change in CHANGES and level in LEVELS:
        waiting.put((CHANGES[change], LEVELS[level], resource))


def get(path):
    return json.loads(orthanc.RestApiGet(path))


def announcement(change, level, resource):
    """What is posted of a change; None if its UIDs are not known, or not any more."""
    if change == "Deleted":
        uids = known.pop(resource, None)
        if uids is None:
            return None
        return {**uids, "ChangeType": change, "ID": resource, "LastUpdate": time.strftime("%Y%m%dT%H%M%S")}
    try:
        found = get(f"/{level}/{resource}")
        study = found if level == "studies" else get(f"/studies/{found['ParentStudy']}")
    except orthanc.OrthancException:  # deleted meanwhile
        return None
    uids = {"StudyInstanceUID": study["MainDicomTags"]["StudyInstanceUID"]}
    told = {"ChangeType": change, "ID": resource, "LastUpdate": found.get("LastUpdate", "")}
    if level == "series":
        uids["SeriesInstanceUID"] = found["MainDicomTags"]["SeriesInstanceUID"]
        told["Modality"] = found["MainDicomTags"].get("Modality", "")
        told["Instances"] = len(found["Instances"])
    known[resource] = uids
    while len(known) > KNOWN:
        known.popitem(last=False)
    return {**uids, **told}


def post(change):
    """Raises OSError when voxcache cannot be reached, or asks to come again."""
    body = json.dumps(change).encode()
    headers = {"Content-Type": "application/json"}
    if TOKEN:
        headers["Authorization"] = f"Bearer {TOKEN}"
    if KEY:
        now = str(int(time.time()))
        mac = hmac.new(KEY.encode(), now.encode() + b"." + body, hashlib.sha256)
        headers.update({"Voxcache-Timestamp": now, "Voxcache-Signature": f"sha256={mac.hexdigest()}"})
    try:
        told = urllib.request.Request(URL, body, headers)  # noqa: S310  # the URL is its user's own
        urllib.request.urlopen(told, timeout=30).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 429 or error.code >= 500:
            raise
        orthanc.LogError(f"voxcache refuses {change['ChangeType']} {change['ID']}: {error.code} {error.read()[:300]!r}")


def work():
    while (change := waiting.get()) is not None:
        told = announcement(*change)
        pause = 1.0
        while told is not None and not stopping.is_set():
            try:
                post(told)
                break
            except OSError as error:
                orthanc.LogWarning(f"voxcache is not told of {told['ChangeType']} {told['ID']} yet: {error}")
                stopping.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE_S)


orthanc.RegisterOnChangeCallback(on_change)
threading.Thread(target=work, name="voxcache", daemon=True).start()
