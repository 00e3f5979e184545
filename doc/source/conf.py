#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Sphinx configuration of the documentation."""

project = "nova_pmt"
copyright = "nova_pmt developers"
author = "nova_pmt developers"

extensions = ["myst_parser", "openstackdocstheme"]
root_doc = "index"
pygments_style = "native"

html_theme = "openstackdocs"
html_theme_options = {"display_global_toc_section": True}
# The project is not on OpenDev: no links to report bugs or to read source there.
openstackdocs_repo_name = ""
openstackdocs_pdf_link = False
openstackdocs_auto_name = False
openstackdocs_auto_version = False
version = release = ""
html_show_copyright = True
