#!/usr/bin/env python3
"""Availability zones that offer every named instance type, with spot prices and vCPU quotas.

find_instance.py c8gn.8xlarge g5.xlarge"""
import argparse
import difflib
import json
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import (BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError,
                                     ProfileNotFound)
except ImportError: sys.exit('find_instance: boto3 is missing; run: pip install boto3')

QUOTAS = json.loads(Path(__file__).with_name('quotas.json').read_text())['on_demand']
DENIED = {'AuthFailure', 'UnauthorizedOperation', 'InvalidClientTokenId', 'SignatureDoesNotMatch', 'ExpiredToken',
          'RequestExpired', 'OptInRequired', 'AccessDenied', 'AccessDeniedException'}


class UserError(Exception): "One line that names what is wrong and the remedy"


def quota_code(
    instance_type:str, # such as g5.xlarge
)->str: # code in Service Quotas
    "The quota that an instance type counts against"
    letters = re.match('[a-z]*', instance_type)[0]
    return QUOTAS.get(letters, QUOTAS['standard'])


def client(
    service:str, # ec2 or service-quotas
    region:str, # where
):
    "A client of boto3 that does not wait for ever"
    config = Config(connect_timeout=10, read_timeout=30, retries={'max_attempts': 3})
    return boto3.client(service, region_name=region, config=config)


def offerings(
    ec2, # client of a region
    types:list, # instance types
)->dict: # zone -> the types it offers
    "Which of `types` each zone of a region offers"
    zones = defaultdict(set)
    filters = [dict(Name='instance-type', Values=types)]
    paginator = ec2.get_paginator('describe_instance_type_offerings')
    for page in paginator.paginate(LocationType='availability-zone', Filters=filters):
        for offer in page['InstanceTypeOfferings']: zones[offer['Location']].add(offer['InstanceType'])
    return zones


def optional(
    call, # asks AWS
    default, # what else
):
    "What `call` gives, or `default` where this account, region or API does not tell"
    try: return call()
    except (ClientError, BotoCoreError): return default


def spot_prices(
    ec2, # client of a region
    types:list, # instance types
)->dict: # (zone, type) -> USD an hour, the latest
    "Present spot prices of a region"
    which = dict(InstanceTypes=types, ProductDescriptions=['Linux/UNIX'], StartTime=datetime.now(timezone.utc))
    history = ec2.get_paginator('describe_spot_price_history').paginate(**which)
    rows = sorted((row for page in history for row in page['SpotPriceHistory']), key=lambda row: row['Timestamp'])
    return {(row['AvailabilityZone'], row['InstanceType']): float(row['SpotPrice']) for row in rows}


def vcpus(
    ec2, # client of a region
    types:list, # instance types
)->dict: # type -> number
    "vCPUs of each type"
    found = ec2.describe_instance_types(InstanceTypes=types)['InstanceTypes']
    return {row['InstanceType']: row['VCpuInfo']['DefaultVCpus'] for row in found}


def exists(
    name:str, # of an instance type
)->bool: # False only where AWS says so
    "Whether there is such an instance type"
    try: vcpus(client('ec2', 'us-east-1'), [name])
    except ClientError as error: return error.response['Error']['Code'] != 'InvalidInstanceType'
    return True


def search_region(
    region:str, # its name
    types:list, # all of them must be offered in one zone
)->tuple: # rows as in --json, and the types that the region offers in any zone
    "The zones of a region that offer every type"
    ec2 = client('ec2', region)
    zones = offerings(ec2, types)
    offered = set().union(*zones.values())
    fitting = sorted(zone for zone, found in zones.items() if found >= set(types))
    if not fitting: return [], offered
    quotas = client('service-quotas', region)
    prices = optional(partial(spot_prices, ec2, types), {})
    sizes = optional(partial(vcpus, ec2, types), {})

    def limit(name): return quotas.get_service_quota(ServiceCode='ec2', QuotaCode=quota_code(name))['Quota']['Value']
    limits = {name: optional(partial(limit, name), None) for name in types}
    rows = [dict(region=region, zone=zone, spot_usd_per_hour={name: prices.get((zone, name)) for name in types},
                 vcpus={name: sizes.get(name) for name in types}, vcpu_quota=limits) for zone in fitting]
    return rows, offered


def all_regions(
    wanted:list|None, # names, `None` for all that the account has enabled
)->list: # raises `UserError` for one that does not exist
    "Regions to search"
    try:
        partitions = 'aws', 'aws-us-gov', 'aws-cn'
        known = {name for partition in partitions for name in boto3.Session().get_available_regions('ec2', partition)}
        enabled = client('ec2', 'us-east-1').describe_regions()['Regions'] if not wanted else []
    except (ClientError, BotoCoreError) as error: raise explain(error) from None
    regions = wanted or sorted(row['RegionName'] for row in enabled)
    for name in regions:
        if name in known: continue
        near = ', '.join(difflib.get_close_matches(name, known, 3)) or 'us-east-1'
        raise UserError(f'{name}: no such region; did you mean {near}?')
    return regions


def search(
    types:list, # instance types
    regions:list|None=None, # as `all_regions` takes them
)->dict: # `types`, `zones` as in --json, `failed` regions with their reason; raises `UserError`
    "Zones of all regions that offer every type"
    regions, zones, offered, failed = all_regions(regions), [], set(), {}
    with ThreadPoolExecutor(16) as pool:
        futures = {region: pool.submit(search_region, region, types) for region in regions}
    for region, future in futures.items():
        try: found, there = future.result()
        except (ClientError, BotoCoreError) as error:
            failed[region] = str(explain(error))
            continue
        zones += found
        offered |= there
    if len(failed) == len(regions): raise UserError(next(iter(failed.values())))
    for name in types:
        if name in offered or exists(name): continue
        where = 'https://aws.amazon.com/ec2/instance-types'
        raise UserError(f'{name}: no such instance type; names look like g5.xlarge, see {where}')
    return dict(types=types, zones=zones, failed=failed)


def explain(
    error:Exception, # of boto3
)->UserError:
    "An error of AWS as one line with a remedy"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        names = 'AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY'
        return UserError(f'no AWS credentials; run `aws configure`, or set {names}')
    if isinstance(error, ProfileNotFound):
        return UserError(f'{error}; `aws configure list-profiles` shows those there are')
    code = error.response['Error']['Code'] if isinstance(error, ClientError) else ''
    if code in DENIED:
        needs = 'they need ec2:Describe* and servicequotas:GetServiceQuota, and must not be expired'
        return UserError(f'AWS refused the credentials ({code}); {needs}')
    return UserError(f'AWS does not answer: {error}; check the network and the names of the regions')


def show(
    value:float|None, # as AWS gave it, or not
    form:str, # of `format`
)->str: # '?' where it is not known
    "A number that may be missing"
    return '?' if value is None else format(value, form)


def table(
    result:dict, # of `search`
)->str: # a line per zone, the cheapest by spot price first
    "The result for people"
    def cost(row): return sum(float('inf') if price is None else price for price in row['spot_usd_per_hour'].values())

    def cell(row, name):
        price, count, limit = (row[key][name] for key in ('spot_usd_per_hour', 'vcpus', 'vcpu_quota'))
        return f"{show(price, '.4f')} | {show(count, 'd')} of {show(limit, '.0f')}"
    lines = [['zone', *(f'{name}: spot USD/h | vCPUs of quota' for name in result['types'])]]
    for row in sorted(result['zones'], key=cost):
        lines.append([row['zone'], *(cell(row, name) for name in result['types'])])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(word.ljust(width) for word, width in zip(words, widths)).rstrip() for words in lines)


def main(
    arguments:list=None, # words of the command line, those of the process if None
)->int: # 0 found, 1 no zone offers all types, 2 wrong input or no access
    "The command"
    codes = 'Exit code: 0 found, 1 no zone offers all types, 2 wrong input or no access.'
    parser = argparse.ArgumentParser('find_instance.py', description=__doc__, epilog=codes)
    parser.add_argument('types', nargs='+', metavar='TYPE', help='instance type, such as g5.xlarge')
    parser.add_argument('--regions', nargs='+', metavar='REGION',
                        help='search these only, not all that the account has enabled')
    parser.add_argument('--json', action='store_true',
                        help='print {types, zones: [{region, zone, spot_usd_per_hour, vcpus, vcpu_quota}], failed}')
    words = parser.parse_intermixed_args(arguments)
    try: result = search(list(dict.fromkeys(words.types)), words.regions)
    except UserError as error:
        print(f'find_instance: {error}', file=sys.stderr)
        return 2
    for region, reason in result['failed'].items():
        print(f'find_instance: {region} left out: {reason}', file=sys.stderr)
    if words.json: print(json.dumps(result, indent=2))
    elif result['zones']: print(table(result))
    else: print(f"no zone offers all of {', '.join(result['types'])}", file=sys.stderr)
    return 0 if result['zones'] else 1


if __name__ == '__main__': sys.exit(main())
