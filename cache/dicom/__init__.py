"""DICOM objects in, one regular volume out, or a typed refusal: the only room that knows pydicom."""
