"""Who may announce arrivals, as data: the route, its description and its documentation are made from this table."""

from typing import Final

import msgspec

from . import aws, azure, cloudevents, google, monai, orthanc, plain, s3
from .post import Parser

_STUDY: Final = "1.2.840.113619.2.55.1"
_SERIES: Final = "1.2.840.113619.2.55.1.7"


class Source(msgspec.Struct, frozen=True):
    """One source: its name in the route, what it sends, in which forms, where they are defined, and an example."""

    name: str
    sends: str
    defined: str
    parse: Parser
    takes: tuple[object, ...]
    example: str
    content_type: str = "application/json"


SOURCES: Final = {
    source.name: source
    for source in (
        Source(
            "plain",
            "voxcache's own form: an object, a folder, a series or a study, or a list of those",
            "arrivals.md#plain",
            plain.parse,
            (plain.Announcement, list[plain.Announcement]),
            f'{{"study":"{_STUDY}","series":"{_SERIES}","expected":300,"complete":true}}',
        ),
        Source(
            "s3",
            "S3 notifications of AWS, MinIO and Ceph, as they are or wrapped by SNS or EventBridge",
            "https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html",
            aws.parse,
            (s3.Notification, aws.Sns, aws.EventBridge),
            '{"Records":[{"eventSource":"aws:s3","eventName":"ObjectCreated:Put","eventTime":"2026-01-02T03:04:05Z",'
            '"s3":{"bucket":{"name":"dicom"},"object":{"key":"1.2/1.2.3/1.dcm","size":525312,"eTag":"d41d8cd98f00",'
            '"sequencer":"0055AED6DCD90281E5"}}}]}',
        ),
        Source(
            "orthanc",
            "stable series and studies, changed metadata and deletions, by the scripts in deploy/orthanc",
            "https://orthanc.uclouvain.be/book/users/lua.html",
            orthanc.parse,
            (orthanc.Change, list[orthanc.Change]),
            f'{{"ChangeType":"StableSeries","ID":"6b9e19d9-62094390-5f9ddb01-4a191ae7-9766b715",'
            f'"StudyInstanceUID":"{_STUDY}","SeriesInstanceUID":"{_SERIES}","Instances":300,'
            '"LastUpdate":"20260102T030405"}',
        ),
        Source(
            "cloudevents",
            "CloudEvents 1.0, structured, batched or binary, that carry one of the other forms' data or a plain one",
            "https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md",
            cloudevents.parse,
            (cloudevents.CloudEvent,),
            '{"specversion":"1.0","id":"A234-1234-1234","source":"/pacs","type":"org.example.series.created",'
            f'"data":{{"study":"{_STUDY}","series":"{_SERIES}"}}}}',
            "application/cloudevents+json",
        ),
        Source(
            "azure",
            "DICOM events of Azure Health Data Services through Event Grid, in both of its schemas",
            "https://learn.microsoft.com/azure/event-grid/event-schema-azure-health-data-services",
            azure.parse,
            (azure.Delivered, list[azure.Delivered]),
            '[{"id":"d621839d-958b-4142-a638-bb966b4f7dfd","eventType":"Microsoft.HealthcareApis.DicomImageCreated",'
            '"eventTime":"2026-01-02T03:04:05Z","data":{'
            f'"imageStudyInstanceUid":"{_STUDY}","imageSeriesInstanceUid":"{_SERIES}"}}}}]',
        ),
        Source(
            "pubsub",
            "pushes of Google Pub/Sub: DICOM stores of the Healthcare API, buckets of Cloud Storage",
            "https://cloud.google.com/healthcare-api/docs/dicom-pubsub",
            google.parse,
            (google.Push,),
            '{"message":{"messageId":"2070443601311540","publishTime":"2026-01-02T03:04:05Z","attributes":{'
            f'"action":"StoreInstances","studyInstanceUID":"{_STUDY}","seriesInstanceUID":"{_SERIES}"}}}}}}',
        ),
        Source(
            "monai",
            "workflow requests of MONAI Deploy's Informatics Gateway, with file_count",
            "https://github.com/Project-MONAI/monai-deploy-informatics-gateway",
            monai.parse,
            (monai.Request,),
            '{"payload_id":"1d8ea6c4-1d0f-4a3b-8d5c-5a3c0f3c2f6b","bucket":"dicom","file_count":1,"payload":[{"path":'
            f'"1d8ea6c4-1d0f-4a3b-8d5c-5a3c0f3c2f6b/dcm/{_STUDY}/{_SERIES}/1.2.3.dcm"}}]}}',
        ),
        Source(
            "healthimaging",
            "import jobs of AWS HealthImaging through EventBridge: the folder that was imported",
            "https://docs.aws.amazon.com/healthimaging/latest/devguide/event-notifications.html",
            aws.parse,
            (aws.EventBridge, aws.Sns),
            '{"id":"7cf0fb1c-8720-4d48-baa3-6eb97b35a10e","detail-type":"Import Job Completed",'
            '"source":"aws.medical-imaging","time":"2026-01-02T03:04:05Z",'
            '"detail":{"jobStatus":"COMPLETED","inputS3Uri":"s3://dicom/input/"}}',
        ),
    )
}


def sources_table() -> str:
    """Every source as a Markdown table."""
    lines = ["| source | what it sends | defined in |", "|---|---|---|"]
    for source in SOURCES.values():
        shown = source.defined.removeprefix("https://").partition("/")[0]
        lines.append(f"| `{source.name}` | {source.sends} | [{shown}]({source.defined}) |")
    return "\n".join(lines) + "\n"
