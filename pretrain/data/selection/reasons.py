"""Numbers of the reasons that a document is dropped for, as files of signatures and fates hold them: a byte each."""

KEPT = 0
EXACT, NEAR, QUALITY, CONTAMINATION = 1, 2, 3, 4
FIRST_RULE = 8  # the rules follow, in their order
NAMES = {
    EXACT: "exact duplicate",
    NEAR: "near duplicate",
    QUALITY: "quality",
    CONTAMINATION: "contamination",
}
