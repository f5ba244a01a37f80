"Reads everything from settings.ini, the one configuration of the package."
from configparser import ConfigParser

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    author=settings['author'],
    author_email=settings['author_email'],
    url=settings['git_url'],
    license='GPL-3.0-only',
    keywords=settings['keywords'].split(),
    classifiers=['Development Status :: 3 - Alpha', *[f'Programming Language :: Python :: {settings[end]}' for end in ('min_python', 'max_python')]],
    packages=find_packages(include=['yolov9001', 'yolov9001.*']),
    package_data={'yolov9001': ['pretrained/*']},
    python_requires=f">={settings['min_python']},<={settings['max_python']}.99",
    install_requires=settings['requirements'].split(),
    extras_require={extra: settings[f'{extra}_requirements'].split() for extra in ('dev', 'docs', 'compare', 'track', 'openvino')},
    entry_points={'console_scripts': settings['console_scripts'].split()},
)
