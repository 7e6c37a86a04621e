from fakes import fake_result
from unpoison.report.folder import write_report


def test_a_run_folder_gets_its_page_and_its_triggers(tmp_path):
    page = write_report(tmp_path, fake_result(location="my images", command="unpoison scan 'my images'"))
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "report.html" and (tmp_path / "triggers/trigger-1.png").is_file()
    assert "<pre>unpoison scan &#39;my images&#39;</pre>" in text


def test_a_page_is_replaced(tmp_path):
    write_report(tmp_path, fake_result())
    assert "No evidence" in write_report(tmp_path, fake_result("no_evidence")).read_text(encoding="utf-8")
