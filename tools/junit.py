"""Print the results of several backends as one JUnit file, a test suite for each.

Usage: python tools/junit.py FOLDER...

A folder holds what ``attnproof check BACKEND --json FOLDER/BACKEND.json`` wrote, ``golden check``
likewise. A case that was not judged, a known deviation, and a backend that cannot run here are
skipped, each with its reason.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as etree

FAILED = ("deviates", "crashed", "timed out")
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


def suite(name: str, result: dict[str, Any]) -> etree.Element:
    """The cases of one backend."""
    element = etree.Element("testsuite", name=name)
    for case in result["cases"]:
        test = etree.SubElement(
            element,
            "testcase",
            classname=f"{name}.{case['chapter']}",
            name=case["id"],
            time=str(case["seconds"]),
        )
        if case["verdict"] in FAILED and not case["known_deviation"]:
            message, text = f"{case['verdict']}: {first_line(case['reason'])}", case["reason"]
            etree.SubElement(test, "failure", message=printable(message)).text = printable(text)
        elif case["verdict"] != "conforms":
            reason = case["known_deviation"] or case["reason"]
            etree.SubElement(
                test, "skipped", message=printable(f"{case['verdict']}: {first_line(reason)}")
            )
    if not result["cases"]:
        test = etree.SubElement(element, "testcase", classname=name, name="available")
        kind = "skipped" if result["summary"]["exit_status"] == 3 else "failure"
        etree.SubElement(test, kind, message=printable(result["summary"]["line"]))
    for kind, attribute in (("testcase", "tests"), ("failure", "failures"), ("skipped", "skipped")):
        element.set(attribute, str(len(list(element.iter(kind)))))
    return element


def first_line(text: str) -> str:
    """The first line, or nothing."""
    return text.partition("\n")[0]


def printable(text: str) -> str:
    """The text without what XML has no place for."""
    return NOT_XML.sub("?", text)


def main(folders: list[Path]) -> None:
    """Print the file."""
    suites = etree.Element("testsuites")
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            result = json.loads(path.read_text("utf-8"))
            if "cases" in result:
                prefix = "golden." if folder.name == "golden" else ""
                suites.append(suite(prefix + path.stem, result))
    if not len(suites):
        sys.exit(f"no results in {', '.join(map(str, folders)) or 'no folder'}")
    etree.indent(suites)
    print(etree.tostring(suites, encoding="unicode"))


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
