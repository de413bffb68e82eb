"""Each setting of the gateway is told in the documentation, and does what is told."""

import ast

import settings_md


def test_every_setting_is_in_the_documentation_with_what_it_does() -> None:
    from hydra_llm.server.settings import ServeSettings

    source = (settings_md.PACKAGE / "server" / "settings.py").read_text(encoding="utf-8")
    told = {name: what for name, _, what in settings_md.fields(ast.parse(source), "ServeSettings")}
    assert list(told) == list(ServeSettings.model_fields)
    assert all(told.values())
    assert settings_md.TARGET.read_text(encoding="utf-8") == settings_md.text()
